"""Sampling text: constant memory and time per token, because the attention state is carried from token to token.

Axes: B prompts side by side, T length, vocab.

A row's text depends on its prompt and its seed only, not on the rows beside it: shorter prompts are padded on the left,
where padding is invisible to the model, and every row draws from a generator of its own, and ends on its own
(`stopping.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from transformer_vq.data import Tokenizer
from transformer_vq.evaluation.mode import evaluating
from transformer_vq.evaluation.stopping import Continuation, Row
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
    on_token: Callable[[list[int | None]], None] | None = None,
    start: int | None = None,
    stop: Sequence[str | bytes] = (),
    stop_tokens: Collection[int] = (),
    tokenizer: Tokenizer | None = None,
) -> list[list[int]]:
    """Continue each prompt by at most `max_tokens` sampled tokens; the prompts themselves are not returned.

    temperature 0 is greedy and inf draws evenly. top_k keeps the k likeliest tokens, top_p the nucleus (see
    `keep_nucleus`); of both, top_k acts first. Row r draws with the seed `seed + r`. `on_token` receives each step's
    new token of every row, None for a row that has ended. `start` is the token that an empty prompt begins with, for
    models that have one. `stop`: strings, looked for in the bytes that `tokenizer` gives; `stop_tokens`: ids. What ends
    a text is not part of it (see `stopping.py`).
    Raises ValueError for an empty prompt without `start`, for `stop` without `tokenizer` and for values out of range.
    """
    found = continuations(
        model,
        prompts,
        max_tokens,
        temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        on_token=on_token,
        start=start,
        stop=stop,
        stop_tokens=stop_tokens,
        tokenizer=tokenizer,
    )
    return [row.tokens for row in found]


def continuations(
    model: TransformerVQ,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    temperature: float = 1.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    on_token: Callable[[list[int | None]], None] | None = None,
    on_text: Callable[[int, bytes], None] | None = None,
    start: int | None = None,
    stop: Sequence[str | bytes] = (),
    stop_tokens: Collection[int] = (),
    tokenizer: Tokenizer | None = None,
) -> list[Continuation]:
    """As `generate`, and says of every row its bytes and what ended it.

    `on_text(row, bytes)` hears of bytes as soon as they are certain: no stop string can begin in them any more.
    """
    stops = [text.encode() if isinstance(text, str) else text for text in stop]
    if start is None and not all(len(prompt) for prompt in prompts):
        raise ValueError("an empty prompt needs `start`, the token that a text begins with")
    if not all(stops):
        raise ValueError("stop: an empty string ends every text before it begins")
    if tokenizer is None and (stops or on_text):
        raise ValueError("stop strings and on_text need `tokenizer`, which gives the bytes behind tokens")
    _check(max_tokens, temperature, top_k, top_p)
    decode = None if tokenizer is None else tokenizer.decode_bytes
    rows = [Row(prompt, stops, stop_tokens, decode) for prompt in prompts]
    draws = [torch.Generator().manual_seed(seed + row) for row in range(len(rows))]
    opened = [list(prompt) or [int(start or 0)] for prompt in prompts]
    with evaluating(model) as device, model.frozen(in_place=True):
        state, tokens = None, torch.empty(0)
        for step in range(max_tokens):
            if all(row.stop is not None for row in rows):
                break
            if step == 0:
                logits, state = _read(opened, model, device)
            else:
                out = model(tokens[:, None], state=state)
                logits, state = out.logits[:, -1], out.state
            uniform = torch.cat([torch.rand(1, generator=draw) for draw in draws]).to(device)
            tokens = sample(logits, uniform, temperature, top_k, top_p)
            new = _still_open(rows, tokens.tolist())
            for i, token in enumerate(new):
                if token is not None:
                    rows[i].add(token)
                    if on_text is not None and (text := rows[i].fresh()):
                        on_text(i, text)
            if on_token is not None:
                on_token(new)
    for i, row in enumerate(rows):
        if on_text is not None and (text := row.rest()):
            on_text(i, text)
    return [row.continuation() for row in rows]


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """One token a row by inverting the distribution function at `uniform`: logits (B, vocab) fp32 or wider,
    uniform (B) in [0, 1) -> (B) int64.

    Tokens are ordered by falling probability, so that a small `uniform` gives a likely token.
    """
    if temperature == 0:
        return logits.argmax(-1)
    below = logits - logits.amax(-1, keepdim=True)  # so that a tiny temperature takes the likeliest, not 0·inf
    span = torch.finfo(logits.dtype)  # beyond it the limits: the likeliest, and all alike
    ordered, tokens = (below / min(max(temperature, span.tiny), span.max)).sort(dim=-1, descending=True, stable=True)
    if top_k is not None and top_k < ordered.shape[-1]:
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


def _still_open(rows: Sequence[Row], tokens: list[int]) -> list[int | None]:
    return [token if row.stop is None else None for row, token in zip(rows, tokens, strict=True)]


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
    if not temperature >= 0:  # nan is not
        raise ValueError(f"temperature = {temperature}: must be at least 0; 0 is greedy")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k}: must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p}: must be greater than 0 and at most 1")
