"""Block-wise VQ attention: linear time and memory, the portable backend.

Walks the sequence in N = T/L blocks, many of them at once. A query sees S cached means, which stand for all keys left
of its block's strip, and the M+L exact keys of the strip (regions of a strip: blocks.py; a chunk of blocks: chunk.py):

    o_i = Σ_s p_is m_s + Σ_j p_ij v_j,   p = softmax over [ q_i·c_s + log n_s ; q_i·k̂_j + bias ]     [Lingle 2309.16354]

The backward pass is written by hand: it keeps the inputs and the cache at the start of each chunk, and computes the
rest again, from the last chunk to the first. Through the mean of a code, a value gets the same gradient from every
later block, so one running sum per code, R_n = dm_n/n_n + R_{n+1}, hands it back.

Axes:  B batch  Hkv key heads  G queries a key head  T length  K, V widths  S codes  M window  L block  N blocks
Oracle: quadratic.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_vq.ops.attention.blocks import Buffers, Plan, blocks_of_chunk, rows_at_once
from transformer_vq.ops.attention.by_hand import by_hand
from transformer_vq.ops.attention.call import Call
from transformer_vq.ops.attention.chunk import Inputs, chunk_backward, chunk_forward
from transformer_vq.ops.attention.rotary import positioned

LONGEST_BLOCK = 128
"""Under `gradients="window"` nothing depends on L, and longer blocks only add keys of the future to each strip."""


class Manner(NamedTuple):
    """How a call is worked; none of it shows in the result."""

    narrow: torch.dtype
    """What enters products: the call's wide type, or 16 bits."""
    L: int
    """Length of a block."""
    rows: int
    """Queries that are worked on together."""


def manner(call: Call) -> Manner:
    """All of it wide."""
    return Manner(call.wide_dtype, block_length(call, LONGEST_BLOCK), rows_at_once(call.q.device))


def block_length(call: Call, longest: int) -> int:
    """L: `longest` counts where L is free."""
    L = max(1, min(call.block_len, call.q.shape[3]))
    return min(L, longest) if call.gradients == "window" else L


def blockwise(call: Call) -> Tensor:
    """`Call` -> o (B, Hkv, G, T, V), wide."""
    return by_hand(call, notes, forward, backward)


def notes(call: Call) -> list[Tensor]:
    """For the backward pass: see `starts`."""
    return list(starts(call, manner(call)))


def forward(call: Call, notes: list[Tensor]) -> Tensor:
    """`Call` -> o, wide, and the notes filled."""
    return attend(*layout(call, manner(call)), (notes[0], notes[1]))


def backward(call: Call, o: Tensor, notes: list[Tensor], d_o: Tensor) -> list[Tensor]:
    """Gradients of `call.learned()`."""
    begun = notes[0], notes[1]
    return learned_gradients(call, manner(call), lambda plan, x: gradients(plan, x, d_o, begun))


Starts = tuple[Tensor, Tensor]
"""Counts (chunks, B, Hkv, S) and sums (chunks, B, Hkv, S, V): the cache that each chunk begins with, wide."""


def starts(call: Call, how: Manner, spare: int = 0) -> Starts:
    """Memory for them, and for some chunks more."""
    B, Hkv, G, T, _ = call.q.shape
    N = -(-T // how.L)
    chunks = -(-N // blocks_of_chunk(N, how.L, G, how.rows)) + spare
    S, V, wide = call.codebook.shape[1] if call.cache else 0, call.v.shape[3], call.wide_dtype
    return call.v.new_empty(chunks, B, Hkv, S, dtype=wide), call.v.new_empty(chunks, B, Hkv, S, V, dtype=wide)


def learned_gradients(call: Call, how: Manner, of_inputs: Callable[[Plan, Inputs], Inputs]) -> list[Tensor]:
    """Gradients of `call.learned()`: those of the inputs, through what `layout` did to the arguments."""
    call = call.with_leaves()
    with torch.enable_grad():
        plan, x = layout(call, how)
    inputs = Inputs(*(None if t is None else t.detach() for t in x))  # type: ignore[arg-type]
    grads = of_inputs(plan, inputs)
    pairs = [(t, g) for t, g in zip(x, grads, strict=True) if t is not None and g is not None and t.requires_grad]
    outputs, given = [t for t, _ in pairs], [g.to(t.dtype) for t, g in pairs]
    return list(torch.autograd.grad(outputs, call.learned(), given, materialize_grads=True))


def layout(call: Call, how: Manner) -> tuple[Plan, Inputs]:
    """What gets no gradient, and what does: with carried keys in front and whole blocks."""
    call = call.wide() if how.narrow == call.wide_dtype else call.of_type(how.narrow)
    M, T, L = call.window, call.q.shape[3], how.L
    N = -(-T // L)
    missing = N * L - T

    def pad(keys: Tensor) -> Tensor:
        return F.pad(keys, (0, 0, 0, missing)) if missing else keys

    q, q_far, k = positioned(call)
    two_sided = call.rotary is not None or call.exact_window or not call.fresh
    k_far = pad(call.k_beyond_window) if two_sided else None

    S = call.codebook.shape[1] if call.cache else 0
    query_run = None if call.run is None else F.pad(call.run, (0, missing), value=-2)
    key_run = F.pad(call.key_run, (0, missing), value=-2)
    ours = (call.query_run[:, :1] == 0)[..., None]  # does the first block see the state's cache?
    count = call.state.count[..., :S] * ours
    plan = Plan(
        codes=F.pad(call.codes_with_carried, (0, missing)).masked_fill(key_run[:, None] < 0, S),
        codebook=call.codebook[:, :S],
        count=count,
        total=call.state.mean[..., :S, :] * count[..., None],
        query_run=query_run,
        key_run=key_run,
        M=M,
        L=L,
        N=N,
        groups=q.shape[2],
        rows=how.rows,
        scale=call.scale,
        gradients=call.gradients,
        through=call.grad_through_cache,
    )
    q_beyond = None if q_far is q and not call.exact_window else q_far
    return plan, Inputs(q, q_beyond, pad(k), k_far, pad(call.v_with_carried), call.bias)


def attend(plan: Plan, x: Inputs, begun: Starts) -> Tensor:
    """o (B, Hkv, G, T, V), in the type of products; fills `begun`."""
    buffers = Buffers(plan.total, x.q.dtype)
    o = x.q.new_empty(*x.q.shape[:4], x.v.shape[3])
    for chunks in plan.chunks():
        cache = plan.count[chunks[0].b, chunks[0].h], plan.total[chunks[0].b, chunks[0].h]
        for i, at in enumerate(chunks):
            begun[0][i, at.b, at.h], begun[1][i, at.b, at.h] = cache
            cache = chunk_forward(x, o, at, plan, cache, buffers)
    return o


def gradients(plan: Plan, x: Inputs, d_o: Tensor, begun: Starts) -> Inputs:
    """Gradients of q, q_far, k, k_far, v and bias, where they exist, wide, from the last chunk to the first."""
    buffers, d_o = Buffers(plan.total, x.q.dtype), d_o.to(x.q.dtype)
    grads = Inputs(*[None if t is None else torch.zeros_like(t, dtype=plan.total.dtype) for t in x])  # type: ignore[arg-type]
    for chunks in plan.chunks():
        running = torch.zeros_like(plan.total[chunks[0].b, chunks[0].h])
        for i, at in reversed(list(enumerate(chunks))):
            cache = begun[0][i, at.b, at.h], begun[1][i, at.b, at.h]
            running = chunk_backward(x, grads, d_o, at, plan, cache, running, buffers)
    return grads
