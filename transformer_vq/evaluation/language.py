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
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray

from transformer_vq.data import TokenFile, eval_streams, eval_windows
from transformer_vq.evaluation.health import SplitHealth
from transformer_vq.evaluation.mode import evaluating
from transformer_vq.evaluation.recurrence import last_seen, scores_by_recurrence
from transformer_vq.models import TransformerVQ

IGNORED = -100
PIECE = 512  # full context: batch_size * PIECE tokens of the one stream are read in a call
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
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score `split`, or its first `max_tokens` predictions -> one flat dict:

    context, loss (nats per token), bits_per_token, perplexity (per token), tokens (scored), bits_per_byte and bytes (of
    the text under the scored tokens, where that is known), word_perplexity (where the split knows its words), and
    codebook health as `SplitHealth.summary` has it.

    recurrence: n, 2 to 8: scores too of targets whose preceding n tokens occurred before, by how far back that was in
    the model's windows, as `scores_by_recurrence` has them; with reset_documents, occurred in the same document.
    reset_documents: attention stops at document boundaries, as `data.document_boundaries: reset` trains it.
    progress(done, total) is called after every call of the model.
    Raises ValueError for a split of fewer than two tokens and for sizes below 1.
    """
    for name, value in (("context", context), ("batch_size", batch_size), ("max_tokens", max_tokens)):
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    if recurrence is not None and not 2 <= recurrence <= 8:
        raise ValueError(f"recurrence = {recurrence}: must be from 2 to 8 tokens")
    if max_tokens is not None:
        split = split.head(max_tokens + 1)
    if len(split) < 2:
        raise ValueError(f"a split of {len(split)} tokens has nothing to predict; at least 2 are needed")
    most = max(1, MOST_LOGITS // _vocabulary(model))
    if context == "full":
        batches = eval_streams(split, min(batch_size * PIECE, most), reset=reset_documents)
    else:
        width = min(context, len(split) - 1)
        batches = eval_windows(split, width, max(1, min(batch_size, most // width)), reset=reset_documents)
    nats, scored, state = 0.0, 0, None
    by_target: list[NDArray[np.float64]] = []  # in the order of the split, whatever the context
    with evaluating(model) as device, SplitHealth(model) as health:
        for batch in batches:
            tokens, labels = batch.tokens.to(device), batch.labels.to(device)
            health.count_only(labels != IGNORED)
            out = model(tokens, state=state, segments=None if batch.segments is None else batch.segments.to(device))
            state = out.state if context == "full" else None
            losses = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
            losses = losses.cpu().double()
            nats += losses.sum().item()
            if recurrence is not None:
                by_target.append(losses[batch.labels.flatten() != IGNORED].numpy())
            scored += int((batch.labels != IGNORED).sum())
            if progress is not None:
                progress(scored, len(split) - 1)
    scores = {"context": context, **_scores(nats, scored, split), **health.summary()}
    if recurrence is not None:
        distance = last_seen(split.tokens, recurrence, split.documents if reset_documents else None)
        covered = None if split.bytes is None else split.covered(1, len(split))
        scores |= scores_by_recurrence(np.concatenate(by_target), distance, covered, model.config.window)
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
