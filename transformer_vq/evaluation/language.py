"""Bits per byte and perplexity of a language model on a whole split, and the health of its codebooks over all of it.

Two ways to give a token its context:
    full   the split is read once from its first token to its last, the state carried: context is everything before, in
           constant memory (a full-attention layer's state grows with the text)
    W      windows of W tokens that overlap by half, no state: context is cut to the W//2 to W tokens before (less only
           where less precedes)

Of the N tokens in a split, N - 1 are scored, each once: nothing predicts the first. The numbers do not depend on
`batch_size`.  Axes: B windows side by side, T tokens in one call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from transformer_vq.data import Batch, Pass, TokenFile, document_spans, eval_streams, eval_windows
from transformer_vq.evaluation.crew import ALONE, Crew, Progress, Turn
from transformer_vq.evaluation.health import SplitHealth
from transformer_vq.evaluation.mode import call_on_nothing, evaluating
from transformer_vq.evaluation.recurrence import last_seen, scores_by_recurrence
from transformer_vq.models import ModelState, TransformerVQ
from transformer_vq.models.split import Line

IGNORED = -100
PIECE = 512  # full context: batch_size * PIECE tokens of the one stream are read in a call
SPAN = 8  # calls, at least, of a run of whole documents that is read apart from the others
MOST_LOGITS = 2**26  # but no more than so many logits are held, 256 MiB in fp32

Context = Literal["full"] | int


def default_context(model: TransformerVQ, seq_len: int) -> Context:
    """`full`, or windows of `seq_len`, the length in training, for a model whose state would grow with the text."""
    return seq_len if model.keeps_every_key else "full"


def evaluate(
    model: TransformerVQ,
    split: TokenFile,
    context: Context = "full",
    batch_size: int = 16,
    max_tokens: int | None = None,
    *,
    reset_documents: bool = False,
    recurrence: int | None = None,
    progress: Progress | None = None,
    crew: Crew = ALONE,
) -> dict[str, Any]:
    """Score `split`, or its first `max_tokens` predictions -> one flat dict:

    context, loss (nats per token), bits_per_token, perplexity (per token), tokens (scored), bits_per_byte and bytes (of
    the text under the scored tokens, where that is known), word_perplexity (where the split knows its words), and
    codebook health as `SplitHealth.summary` has it.

    recurrence: n, 2 to 8: scores too of targets whose preceding n tokens occurred before, by how far back that was in
    the model's windows, as `scores_by_recurrence` has them; with reset_documents, occurred in the same document.
    reset_documents: attention stops at document boundaries, as `data.document_boundaries: reset` trains it.
    progress(done, total) is called after every call of the model.
    crew: the processes that do this together, each of which gets the whole answer. Where a text of full context is more
    than a process's share, they read it as pieces of one sequence; not where a layer keeps every key.
    Raises ValueError for a split of fewer than two tokens and for sizes below 1.
    """
    reading = Reading(model, split, context, batch_size, max_tokens, reset_documents, recurrence)
    (scores,) = read_together(model, [reading], crew, progress)
    return scores


def read_together(
    model: TransformerVQ, readings: Sequence[Reading], crew: Crew = ALONE, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """The scores of each, all of their courses dealt out over the processes at once."""
    courses = [(reading, course) for reading in readings for course in range(len(reading.courses))]
    calls = [len(reading.courses[course]) for reading, course in courses]
    total = sum(len(reading.split) - 1 for reading in readings)
    together = [reading.context == "full" and not model.keeps_every_key for reading, _ in courses]
    with evaluating(model, crew.in_step) as device:

        def do(turn: Turn) -> int:
            reading, course = courses[turn.course]
            return reading.call(course, turn.call, device, crew.lines.get(turn.beside))

        crew.work(calls, do, lambda: call_on_nothing(model, device), total, progress, together)
    return [reading.scores(crew) for reading in readings]


class Reading:
    """One split that is being scored: its courses, and what was found so far. Arguments and errors as `evaluate`."""

    def __init__(
        self,
        model: TransformerVQ,
        split: TokenFile,
        context: Context,
        batch_size: int,
        max_tokens: int | None,
        reset_documents: bool,
        recurrence: int | None,
        keep: bool = False,
    ) -> None:
        """keep: `nats` are wanted, of every target."""
        for name, value in (("context", context), ("batch_size", batch_size), ("max_tokens", max_tokens)):
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if recurrence is not None and not 2 <= recurrence <= 8:
            raise ValueError(f"recurrence = {recurrence}: must be from 2 to 8 tokens")
        if max_tokens is not None:
            split = split.head(max_tokens + 1)
        if len(split) < 2:
            raise ValueError(f"a split of {len(split)} tokens has nothing to predict; at least 2 are needed")
        self.model, self.split, self.context = model, split, context
        self.reset, self.recurrence = reset_documents, recurrence
        self.keeps = keep or recurrence is not None
        self.nats: NDArray[np.float64] | None = None
        """(N - 1): of every target in the order of the split, once scored, where they are kept."""
        self.courses = self._courses(batch_size)
        self.health = SplitHealth(model)
        self.state: ModelState | None = None
        self.found: dict[tuple[int, int], tuple[float, int]] = {}  # by course and call: nats, and of how many targets
        self.by_target: dict[tuple[int, int], NDArray[np.float64]] = {}

    def _courses(self, batch_size: int) -> list[Sequence[Batch]]:
        split, reset, most = self.split, self.reset, max(1, MOST_LOGITS // _vocabulary(self.model))
        if self.context != "full":
            width = min(self.context, len(split) - 1)
            windows = eval_windows(split, width, max(1, min(batch_size, most // width)), reset=reset)
            return [Pass(1, lambda _, number=number: windows[number]) for number in range(len(windows))]  # type: ignore[misc]
        length = min(batch_size * PIECE, most)
        spans = document_spans(split, SPAN * length) if reset else [(0, len(split) - 1)]
        return [eval_streams(split, length, reset=reset, start=start, stop=stop) for start, stop in spans]

    def call(self, course: int, call: int, device: torch.device, line: Line | None = None) -> int:
        """One call of the model: how many targets it scored. Those of a course follow one another.

        line: the processes that make one of the next calls each, at once.
        """
        batch = self.courses[course][call]
        tokens, labels = batch.tokens.to(device), batch.labels.to(device)
        state = self.state if call and (line is None or line.first) else None
        segments = None if batch.segments is None else batch.segments.to(device)
        with self.health, self.model.split_over(line):
            self.health.count_only(labels != IGNORED, (course, call))
            out = self.model(tokens, state=state, segments=segments)
        self.state = out.state if self.context == "full" else None
        losses = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        losses = losses.cpu().double()
        scored = int((batch.labels != IGNORED).sum())
        self.found[course, call] = losses.sum().item(), scored
        if self.keeps:
            self.by_target[course, call] = losses[batch.labels.flatten() != IGNORED].numpy()
        return scored

    def scores(self, crew: Crew) -> dict[str, Any]:
        """What all processes found, added up in the order of the split whoever found it."""
        self.state = None
        found, split = crew.together(self.found).values(), self.split
        nats, scored = sum(nats for nats, _ in found), sum(count for _, count in found)
        scores = {"context": self.context, **_scores(nats, scored, split), **self.health.shared(crew).summary()}
        if self.keeps:
            self.nats = np.concatenate(list(crew.together(self.by_target).values()))
        if self.recurrence is not None and self.nats is not None:
            distance = last_seen(split.tokens, self.recurrence, split.documents if self.reset else None)
            covered = None if split.bytes is None else split.covered(1, len(split))
            scores |= scores_by_recurrence(self.nats, distance, covered, self.model.config.window)
        return scores


def _scores(nats: float, tokens: int, split: TokenFile) -> dict[str, float]:
    """What `nats` over `tokens` predictions amounts to: all tokens of the split but the first."""
    scores: dict[str, float] = {
        "loss": nats / tokens,
        "bits_per_token": nats / tokens / math.log(2),
        "perplexity": _exp(nats / tokens),
        "tokens": tokens,
    }
    if split.bytes is not None:
        text = split.bytes - int(split.covered(0, 1).sum())
        scores["bits_per_byte"] = nats / math.log(2) / text if text else math.inf
        scores["bytes"] = text
    if split.words:
        scores["word_perplexity"] = _exp(nats / split.words)
    return scores


def _exp(x: float) -> float:
    """exp that says inf where the number is too large to hold."""
    return math.exp(x) if x < 700 else math.inf


def _vocabulary(model: TransformerVQ) -> int:
    assert model.config.vocab_size is not None, "a model knows its vocabulary"
    return model.config.vocab_size
