"""Bits per byte by position: what a token gains from all the text before it, far beyond the length in training.

A split is cut into texts of `length` tokens, one after another, whatever its documents; each is read from its first
token, the state carried from piece to piece, so a token at position p has exactly p tokens of context. Predictions are
gathered in bins of positions, half an octave wide. Texts are the unit of the standard error: tokens of one text are not
independent.

Axes: B texts side by side, T tokens of one call, N texts, P predictions of a text (its length)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from transformer_vq.data import TokenFile
from transformer_vq.evaluation.crew import ALONE, Crew, Progress, Turn
from transformer_vq.evaluation.language import MOST_LOGITS, PIECE
from transformer_vq.evaluation.mode import call_on_nothing, evaluating
from transformer_vq.evaluation.recurrence import groups, last_seen
from transformer_vq.models import ModelState, TransformerVQ

FIRST_BIN = 16
"""Predictions in the first bin; later ones end at 16·√2, 32, 32·√2, …"""


class Bin(NamedTuple):
    """Predictions with at least `start` and fewer than `stop` tokens before the one that is read last."""

    start: int
    stop: int
    bits_per_byte: float
    standard_error: float
    """Over texts; nan for a single text."""


class Recurrences(NamedTuple):
    """Predictions of one group, by how far back the tokens before them occurred last, in the same text."""

    group: str
    """See `recurrence.group_names`."""
    tokens: int
    bits_per_byte: float | None
    """None where the group is empty, or has no bytes."""
    standard_error: float
    """Over texts; nan for a single text."""


@dataclass(frozen=True)
class Texts:
    """What every prediction of N texts cost."""

    tokens: NDArray[np.int64]
    """(N, P + 1): each text, and the token that follows it."""
    nats: NDArray[np.float64]
    """(N, P), of each token but the first."""
    covered: NDArray[np.int64]
    """(N, P) bytes under it."""

    def by_position(self) -> list[Bin]:
        """Bits per byte in each of `bins`."""
        return [Bin(a, b, *_ratio(self.nats[:, a:b], self.covered[:, a:b])) for a, b in bins(self.nats.shape[1])]

    def by_recurrence(self, n: int, window: int) -> list[Recurrences]:
        """Bits per byte of each of `recurrence.groups`: where the n tokens before occurred earlier in the text."""
        distance = np.stack([last_seen(text, n) for text in self.tokens])
        found = []
        for name, chosen in groups(distance, window).items():
            bits, error = _ratio(np.where(chosen, self.nats, 0), np.where(chosen, self.covered, 0))
            found.append(Recurrences(name, int(chosen.sum()), bits if math.isfinite(bits) else None, error))
        return found


def score_texts(
    model: TransformerVQ,
    split: TokenFile,
    length: int,
    batch_size: int = 16,
    max_texts: int | None = None,
    progress: Progress | None = None,
    crew: Crew = ALONE,
) -> Texts:
    """Score the first `max_texts` texts of `length` tokens in `split`; a rest at its end is left out.

    progress(done, total) counts predictions. crew: the processes that do this together, each of which gets everything.
    Raises ValueError for sizes below 1, a split that holds no such text, and tokens that came without their text.
    """
    for name, value in (("length", length), ("batch_size", batch_size), ("max_texts", max_texts)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    texts = (len(split) - 1) // length
    if texts < 1:
        raise ValueError(f"length = {length:,}: {split.name} has {len(split):,} tokens, one more than that is needed")
    texts = min(texts, max_texts or texts)
    read = split.covered(1, texts * length + 1).reshape(texts, length)
    tokens = np.asarray(split.tokens[: texts * length + 1]).astype(np.int64)
    inputs, labels = tokens[:-1].reshape(texts, length), tokens[1:].reshape(texts, length)
    found: dict[tuple[int, int], NDArray[np.float64]] = {}  # by batch of texts and piece: nats (B, T)
    piece = max(1, min(PIECE, MOST_LOGITS // (batch_size * (model.config.vocab_size or 1))))
    state: ModelState | None = None
    with evaluating(model, crew.in_step) as device:

        def do(turn: Turn) -> int:
            nonlocal state
            batch, call = turn.course, turn.call
            rows = slice(batch * batch_size, min((batch + 1) * batch_size, texts))
            columns = slice(call * piece, min((call + 1) * piece, length))
            out = model(torch.from_numpy(inputs[rows, columns]).to(device), state=state if call else None)
            state = out.state
            target = torch.from_numpy(labels[rows, columns]).to(device)
            losses = F.cross_entropy(out.logits.transpose(1, 2), target, reduction="none")
            found[batch, call] = losses.double().cpu().numpy()
            return target.numel()

        calls = [-(-length // piece)] * -(-texts // batch_size)
        crew.work(calls, do, lambda: call_on_nothing(model, device), labels.size, progress)
    whole = crew.together(found)
    nats = np.block([[whole[batch, call] for call in range(count)] for batch, count in enumerate(calls)])
    return Texts(np.column_stack([inputs, labels[:, -1]]), nats, read)


def bins(length: int) -> list[tuple[int, int]]:
    """Borders of the bins of a text, half an octave each; the last ends at `length`."""
    stops = [FIRST_BIN]
    while stops[-1] < length:
        stops.append(round(FIRST_BIN * math.sqrt(2) ** len(stops)))
    stops[-1] = length
    return list(zip([0, *stops[:-1]], stops, strict=True))


def _ratio(nats: NDArray[np.float64], covered: NDArray[np.int64]) -> tuple[float, float]:
    """nats, covered (N, some P) -> all bits over all bytes, and its standard error by the delta method.

    Without any bytes there is none: inf, nan.
    """
    read = covered.sum(1).astype(np.float64)
    if not read.any():
        return math.inf, math.nan
    bits = nats.sum(1) / math.log(2)
    ratio = bits.sum() / read.sum()
    n = len(bits)
    error = math.sqrt(np.square(bits - ratio * read).sum() / (n - 1) / n) / read.mean() if n > 1 else math.nan
    return float(ratio), error
