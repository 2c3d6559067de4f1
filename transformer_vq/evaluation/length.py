"""Bits per byte by position: what a token gains from all the text before it, far beyond the length in training.

A split is cut into texts of `length` tokens, one after another, whatever its documents; each is read from its first
token, the state carried from piece to piece, so a token at position p has exactly p tokens of context. Predictions are
gathered in bins of positions, half an octave wide. Texts are the unit of the standard error: tokens of one text are not
independent.

Axes: B texts side by side, T tokens of one call, N texts, P predictions of a text (its length)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from transformer_vq.data import TokenFile
from transformer_vq.evaluation.language import MOST_LOGITS, PIECE
from transformer_vq.evaluation.mode import evaluating
from transformer_vq.models import TransformerVQ

FIRST_BIN = 16
"""Predictions in the first bin; later ones end at 16·√2, 32, 32·√2, …"""


class Bin(NamedTuple):
    """Predictions with at least `start` and fewer than `stop` tokens before the one that is read last."""

    start: int
    stop: int
    bits_per_byte: float
    standard_error: float
    """Over texts; nan for a single text."""


def bits_by_position(
    model: TransformerVQ,
    split: TokenFile,
    length: int,
    batch_size: int = 16,
    max_texts: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Bin]:
    """Score the first `max_texts` texts of `length` tokens in `split`; a rest at its end is left out.

    progress(done, total) counts predictions.  Raises ValueError for sizes below 1, a split that holds no such text, and
    tokens that came without their text.
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
    nats = np.empty((texts, length))
    with evaluating(model) as device:
        for first in range(0, texts, batch_size):
            rows = slice(first, min(first + batch_size, texts))
            piece = max(1, min(PIECE, MOST_LOGITS // (batch_size * (model.config.vocab_size or 1))))
            state = None
            for start in range(0, length, piece):
                columns = slice(start, start + piece)
                out = model(torch.from_numpy(inputs[rows, columns]).to(device), state=state)
                state = out.state
                target = torch.from_numpy(labels[rows, columns]).to(device)
                losses = F.cross_entropy(out.logits.transpose(1, 2), target, reduction="none")
                nats[rows, columns] = losses.double().cpu().numpy()
                if progress is not None:
                    progress(rows.start * length + (rows.stop - rows.start) * min(start + piece, length), nats.size)
    return [_bin(nats[:, a:b], read[:, a:b], a) for a, b in bins(length)]


def bins(length: int) -> list[tuple[int, int]]:
    """Borders of the bins of a text, half an octave each; the last ends at `length`."""
    stops = [FIRST_BIN]
    while stops[-1] < length:
        stops.append(round(FIRST_BIN * math.sqrt(2) ** len(stops)))
    stops[-1] = length
    return list(zip([0, *stops[:-1]], stops, strict=True))


def _bin(nats: NDArray[np.float64], covered: NDArray[np.int64], start: int) -> Bin:
    """nats, covered (N, P of the bin) -> the ratio of all bits and all bytes, its error by the delta method.

    A bin without any bytes has none: inf, nan.
    """
    read = covered.sum(1).astype(np.float64)
    if not read.any():
        return Bin(start, start + nats.shape[1], math.inf, math.nan)
    bits = nats.sum(1) / math.log(2)
    ratio = bits.sum() / read.sum()
    n = len(bits)
    error = math.sqrt(np.square(bits - ratio * read).sum() / (n - 1) / n) / read.mean() if n > 1 else math.nan
    return Bin(start, start + nats.shape[1], float(ratio), error)
