"""Sampling text: constant memory and time per token, because the attention state is carried from token to token.

Axes: B prompts side by side, T length, vocab.

A row's text depends on its prompt and its seed only, not on the rows beside it: shorter prompts are padded on the left,
where padding is invisible to the model, and every row draws from a generator of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from transformer_vq.evaluation.mode import evaluating
from transformer_vq.models import ModelState, TransformerVQ

PREFILL = (
    2048  # tokens of a prompt that are read at a time, so that a long prompt needs no more memory than a short one
)


def generate(
    model: TransformerVQ,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    temperature: float = 1.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    on_token: Callable[[list[int]], None] | None = None,
    start: int | None = None,
) -> list[list[int]]:
    """Continue each prompt by `max_tokens` sampled tokens; the prompts themselves are not returned.

    temperature 0 is greedy. top_k keeps the k likeliest tokens, top_p the nucleus (see `keep_nucleus`); of both, top_k
    acts first. Row r draws with the seed `seed + r`. `on_token` receives each step's new token of every row.
    `start` is the token that an empty prompt begins with, for models that have one.
    Raises ValueError for an empty prompt without `start` and for values out of range.
    """
    if start is None and not all(len(prompt) for prompt in prompts):
        raise ValueError("an empty prompt needs `start`, the token that a text begins with")
    _check(max_tokens, temperature, top_k, top_p)
    texts: list[list[int]] = [[] for _ in prompts]
    if not texts or max_tokens == 0:
        return texts
    draws = [torch.Generator().manual_seed(seed + row) for row in range(len(texts))]
    opened = [list(prompt) or [int(start or 0)] for prompt in prompts]
    with evaluating(model) as device, model.frozen():
        logits, state = _read(opened, model, device)
        for step in range(max_tokens):
            uniform = torch.cat([torch.rand(1, generator=draw) for draw in draws]).to(device)
            tokens = sample(logits, uniform, temperature, top_k, top_p)
            new = tokens.tolist()
            for text, token in zip(texts, new, strict=True):
                text.append(token)
            if on_token is not None:
                on_token(new)
            if step + 1 < max_tokens:
                out = model(tokens[:, None], state=state)
                logits, state = out.logits[:, -1], out.state
    return texts


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """One token a row by inverting the distribution function at `uniform`: logits (B, vocab) fp32 or wider,
    uniform (B) in [0, 1) -> (B) int64.

    Tokens are ordered by falling probability, so that a small `uniform` gives a likely token.
    """
    if temperature == 0:
        return logits.argmax(-1)
    below = logits - logits.amax(-1, keepdim=True)  # so that a tiny temperature takes the likeliest, not 0·inf
    ordered, tokens = (below / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered, tokens = ordered[:, :top_k], tokens[:, :top_k]
    weights = ordered.softmax(-1)
    if top_p is not None:
        weights = keep_nucleus(weights, top_p)
    reached = weights.cumsum(-1)
    picked = torch.searchsorted(reached, uniform[:, None] * reached[:, -1:], right=True)
    possible = (weights > 0).sum(-1, keepdim=True)  # the product above may round up to the very end
    return tokens.gather(-1, picked.clamp(max=possible - 1)).squeeze(-1)


def keep_nucleus(weights: Tensor, top_p: float) -> Tensor:
    """Zero all but the nucleus of probabilities in falling order, (B, vocab) -> same.

    A token stays when the probabilities cumulated from the least likely upward to it exceed 1 - p; the likeliest always
    stays   [Lingle 2309.16354's code].
    """
    from_below = weights.flip(-1).cumsum(-1).flip(-1)
    stays = from_below > 1 - top_p
    stays[:, 0] = True
    return weights * stays


def _read(rows: list[list[int]], model: TransformerVQ, device: torch.device) -> tuple[Tensor, ModelState]:
    """Read the prompts piece by piece: logits (B, vocab) after their last token, and the state."""
    longest = max(map(len, rows))
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    real = (
        torch.arange(longest, device=device)
        >= torch.tensor([longest - len(row) for row in rows], device=device)[:, None]
    )
    ragged = not bool(real.all())
    state = None
    for begin in range(0, longest, PREFILL):
        piece = slice(begin, begin + PREFILL)
        out = model(padded[:, piece], state=state, mask=real[:, piece] if ragged else None)
        state = out.state
    return out.logits[:, -1], out.state


def _check(max_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_tokens < 0:
        raise ValueError(f"max_tokens = {max_tokens}: must be at least 0")
    if temperature < 0:
        raise ValueError(f"temperature = {temperature}: must be at least 0; 0 is greedy")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k}: must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p}: must be greater than 0 and at most 1")
