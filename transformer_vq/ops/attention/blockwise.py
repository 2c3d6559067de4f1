"""Block-wise VQ attention: linear time and memory, the portable backend.

Walks the sequence in N = T/L blocks, many of them at once. A query sees S cached means, which stand for all keys left
of its block's strip, and the M+L exact keys of the strip (regions of a strip: blocks.py):

    o_i = Σ_s p_is m_s + Σ_j p_ij v_j,   p = softmax over [ q_i·c_s + log n_s ; q_i·k̂_j + bias ]     [Lingle 2309.16354]

The backward pass is written by hand: it keeps the inputs, the output and the cache at the start of each chunk, and
computes the rest again, from the last chunk to the first. Through the mean of a code, a value gets the same gradient
from every later block, so one running sum per code, R_n = dm_n/n_n + R_{n+1}, hands it back.

Axes:  B batch  Hkv key heads  G queries a key head  T length  K, V widths  S codes  M window  L block  N blocks
Oracle: quadratic.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from transformer_vq.ops.attention.blocks import (
    Buffers,
    Chunk,
    Plan,
    add_bias_grad,
    add_strips,
    band,
    bias_rows,
    blocks_of_chunk,
    cache_backward,
    cache_prefix,
    hide,
    put_query_rows,
    query_rows,
    strips,
)
from transformer_vq.ops.attention.call import Call
from transformer_vq.ops.attention.rotary import positioned

LONGEST_BLOCK = 128
"""Under `gradients="window"` nothing depends on L, and longer blocks only add keys of the future to each strip."""


class Inputs(NamedTuple):
    """What gets gradient. `far` is how a pair beyond the window is seen; None: as inside it."""

    q: Tensor
    """(B, Hkv, G, T, K)."""
    q_far: Tensor | None
    k: Tensor
    """(B, Hkv, M+N·L, K)."""
    k_far: Tensor | None
    v: Tensor
    """(B, Hkv, M+N·L, V)."""
    bias: Tensor | None
    """(B or 1, Hkv, G, T or 1, M+1)."""


def blockwise(call: Call) -> Tensor:
    """`Call` -> o (B, Hkv, G, T, V), wide."""
    plan, x = layout(call)
    o: Tensor = BlockwiseAttention.apply(plan, *x)
    return o


def notes(call: Call) -> list[Tensor]:
    """For the backward pass: the cache at the start of each chunk, counts and sums, and a narrow o's wide original."""
    B, Hkv, G, T, _ = call.q.shape
    L, N = blocks_of(call)
    chunks = -(-N // blocks_of_chunk(N, L, G, call.q.device))
    S, V, wide = call.codebook.shape[1] if call.cache else 0, call.v.shape[3], call.wide_dtype
    made = [call.v.new_empty(chunks, B, Hkv, S, dtype=wide), call.v.new_empty(chunks, B, Hkv, S, V, dtype=wide)]
    return made if call.v.dtype == wide else [*made, call.v.new_empty(B, Hkv, G, T, V, dtype=wide)]


def forward(call: Call, notes: list[Tensor]) -> Tensor:
    """`Call` -> o, wide, and the notes filled."""
    plan, x = layout(call)
    o = attend(plan, x, (notes[0], notes[1]))
    return notes[2].copy_(o) if len(notes) > 2 else o


def backward(call: Call, o: Tensor, notes: list[Tensor], d_o: Tensor) -> list[Tensor]:
    """Gradients of `call.learned()`."""
    call = call.with_leaves()
    with torch.enable_grad():
        plan, x = layout(call)
    inputs = Inputs(*(None if t is None else t.detach() for t in x))  # type: ignore[arg-type]
    wide = notes[2] if len(notes) > 2 else o
    grads = gradients(plan, inputs, wide, d_o.to(wide.dtype), (notes[0], notes[1]))
    pairs = [(t, g) for t, g in zip(x, grads, strict=True) if t is not None and t.requires_grad]
    found = torch.autograd.grad([t for t, _ in pairs], call.learned(), [g for _, g in pairs], materialize_grads=True)
    return list(found)


def blocks_of(call: Call) -> tuple[int, int]:
    """L and N: the length of a block and their number."""
    T = call.q.shape[3]
    L = max(1, min(call.block_len, T))
    if call.gradients == "window":
        L = min(L, LONGEST_BLOCK)
    return L, -(-T // L)


def layout(call: Call) -> tuple[Plan, Inputs]:
    """What gets no gradient, and what does: wide, with carried keys in front and whole blocks."""
    call = call.wide()
    M, T = call.window, call.q.shape[3]
    L, N = blocks_of(call)
    missing = N * L - T

    def pad(keys: Tensor) -> Tensor:
        return F.pad(keys, (0, 0, 0, missing)) if missing else keys

    q, q_far, k = positioned(call)
    two_sided = call.rotary is not None or not call.fresh
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
        gradients=call.gradients,
        through=call.grad_through_cache,
    )
    return plan, Inputs(q, None if q_far is q else q_far, pad(k), k_far, pad(call.v_with_carried), call.bias)


Starts = tuple[Tensor, Tensor]
"""Counts (chunks, B, Hkv, S) and sums (chunks, B, Hkv, S, V): the cache that each chunk begins with."""


def attend(plan: Plan, x: Inputs, starts: Starts | None) -> Tensor:
    """o (B, Hkv, G, T, V); fills `starts`."""
    buffers = Buffers(x.q)
    o = x.q.new_empty(*x.q.shape[:4], x.v.shape[3])
    for chunks in plan.chunks():
        count, total = plan.count[chunks[0].b, chunks[0].h], plan.total[chunks[0].b, chunks[0].h]
        for i, at in enumerate(chunks):
            if starts is not None:
                starts[0][i, at.b, at.h], starts[1][i, at.b, at.h] = count, total
            values, counts, count, total = joint_values(x, at, plan, count, total, buffers)
            p, _, _ = probabilities(x, at, plan, counts, buffers)
            put_query_rows(o, product(p, values, buffers("o", *p.shape[:4], values.shape[4])), at, plan)
    return o


def gradients(plan: Plan, x: Inputs, o: Tensor, d_o: Tensor, starts: Starts) -> Inputs:
    """Gradients of q, q_far, k, k_far, v and bias, where they exist, from the last chunk to the first."""
    buffers = Buffers(x.q)
    grads = Inputs(*[None if t is None else torch.zeros_like(t) for t in x])  # type: ignore[arg-type]
    for chunks in plan.chunks():
        running = torch.zeros_like(plan.total[chunks[0].b, chunks[0].h])
        for i, at in reversed(list(enumerate(chunks))):
            start = starts[0][i, at.b, at.h], starts[1][i, at.b, at.h]
            running = chunk_backward(x, grads, o, d_o, at, plan, start, running, buffers)
    return grads


class BlockwiseAttention(torch.autograd.Function):
    """Forward and backward over the chunks of a plan."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        q: Tensor,
        q_far: Tensor | None,
        k: Tensor,
        k_far: Tensor | None,
        v: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """Arguments as in `Inputs` -> o (B, Hkv, G, T, V)."""
        x, chunks = Inputs(q, q_far, k, k_far, v, bias), len(next(plan.chunks()))
        ctx.plan, ctx.starts = plan, (q.new_empty(chunks, *plan.count.shape), q.new_empty(chunks, *plan.total.shape))
        o = attend(plan, x, ctx.starts)
        ctx.save_for_backward(*x, o)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, q_far, k, k_far, v and bias, where they exist."""
        *inputs, o = ctx.saved_tensors
        return None, *gradients(ctx.plan, Inputs(*inputs), o, d_o, ctx.starts)


def joint_values(
    x: Inputs, at: Chunk, plan: Plan, count: Tensor, total: Tensor, buffers: Buffers
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[m_s ; v_j] of each block (b, h, n, S+M+L, V), the counts (b, h, n, S), and the cache of the next chunk."""
    exact = strips(x.v, at, plan)
    if plan.cached == 0:
        return exact, count[:, :, None], count, total
    values = buffers("values", *exact.shape[:3], plan.cached + exact.shape[3], exact.shape[4])
    values[:, :, :, plan.cached :] = exact
    counts, totals = cache_prefix(count, total, x.v, at, plan)
    torch.div(totals[:, :, :-1], counts[:, :, :-1, :, None].clamp_min(1), out=values[:, :, :, : plan.cached])
    return values, counts[:, :, :-1], counts[:, :, -1], totals[:, :, -1]


def joint_keys(k: Tensor, at: Chunk, plan: Plan, buffers: Buffers) -> Tensor:
    """[c_s ; k̂_j] of each block: (b, h, n, S+M+L, K)."""
    exact = strips(k, at, plan)
    keys = buffers("keys", *exact.shape[:3], plan.cached + exact.shape[3], exact.shape[4])
    keys[:, :, :, : plan.cached] = plan.codebook[at.h, None]
    keys[:, :, :, plan.cached :] = exact
    return keys


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Batched a @ b into `out`; all have axes (b, h, n, ·, ·)."""
    torch.bmm(a.flatten(0, 2), b.flatten(0, 2), out=out.flatten(0, 2))
    return out


def has_far(x: Inputs, at: Chunk, plan: Plan) -> bool:
    """Whether pairs beyond the window are seen otherwise than those inside.

    Always with rotary positions; without, only where carried keys are, which may stem from an older codebook.
    """
    return x.q_far is not None or (x.k_far is not None and at.n.start * plan.L < plan.M)


def probabilities(x: Inputs, at: Chunk, plan: Plan, counts: Tensor, buffers: Buffers) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over [cache ; strip]: p (b, h, n, G·L, S+M+L); with the queries and joint keys of the far side."""
    far = has_far(x, at, plan)
    q = query_rows(x.q if x.q_far is None else x.q_far, at, plan)
    keys = joint_keys(x.k_far if far else x.k, at, plan, buffers)  # type: ignore[arg-type]
    logits = product(q, keys.mT, buffers("p", *q.shape[:4], keys.shape[3]))
    if far:
        near = buffers("near", *q.shape[:4], plan.M + plan.L)
        product(query_rows(x.q, at, plan), strips(x.k, at, plan).mT, near)
        band(logits, plan).copy_(band(near, plan))
    if x.bias is not None:
        band(logits, plan).add_(bias_rows(x.bias, at, plan))
    logits[..., : plan.cached].add_(counts.log()[:, :, :, None])
    hide(logits.unflatten(3, (plan.groups, plan.L)), at, plan)
    return torch.softmax(logits, dim=-1, out=logits), q, keys


def chunk_backward(
    x: Inputs,
    grads: Inputs,
    o: Tensor,
    d_o: Tensor,
    at: Chunk,
    plan: Plan,
    start: tuple[Tensor, Tensor],
    running: Tensor,
    buffers: Buffers,
) -> Tensor:
    """Add the gradients of one chunk to `grads`. `running` (b, h, S, V) is R of the next chunk; returns this one's."""
    S, M = plan.cached, plan.M
    values, counts, _, _ = joint_values(x, at, plan, *start, buffers)
    p, q, keys = probabilities(x, at, plan, counts, buffers)
    d_rows = query_rows(d_o, at, plan)
    d_logits = product(d_rows, values.mT, buffers("d_logits", *p.shape))
    d_logits.sub_((d_rows * query_rows(o, at, plan)).sum(-1, keepdim=True)).mul_(p)
    if grads.bias is not None:
        add_bias_grad(grads.bias, band(d_logits, plan), at, plan)

    windowed = plan.gradients == "window"
    skip = 0 if windowed or plan.through else M  # rule "block" without cache gradient: only the block's own keys
    if windowed and not plan.through:
        clear_bubble(p, plan)
    through_cache = plan.through and S > 0
    first = 0 if through_cache else S + skip
    columns = p[..., first:].mT
    d_values = product(columns, d_rows, buffers("d_values", *columns.shape[:4], d_rows.shape[4]))
    if through_cache:
        running = cache_backward(grads.v, d_values[..., :S, :], counts, running, at, plan)
        d_values = d_values[..., S:, :]
    add_strips(grads.v, d_values, at, plan, skip)

    if has_far(x, at, plan):
        d_near = buffers("near", *p.shape[:4], p.shape[4] - S).zero_()
        band(d_near, plan).copy_(band(d_logits, plan))
        band(d_logits, plan).zero_()
        q_near, k_near = query_rows(x.q, at, plan), strips(x.k, at, plan)
        d_q, d_q_far = d_near @ k_near, d_logits @ keys
        if grads.q_far is None:
            d_q += d_q_far
        else:
            put_query_rows(grads.q_far, d_q_far, at, plan)
        put_query_rows(grads.q, d_q, at, plan)
        add_strips(grads.k, d_near[..., skip:].mT @ q_near, at, plan, skip)
        if not windowed:
            assert grads.k_far is not None, "the far side has keys of its own"
            add_strips(grads.k_far, d_logits[..., S + skip :].mT @ q, at, plan, skip)
    else:
        put_query_rows(grads.q, product(d_logits, keys, buffers("d_q", *q.shape)), at, plan)
        if windowed:
            clear_bubble(d_logits, plan)
        columns = d_logits[..., S + skip :].mT
        add_strips(grads.k, product(columns, q, buffers("d_k", *columns.shape[:4], q.shape[4])), at, plan, skip)
    return running


def clear_bubble(x: Tensor, plan: Plan) -> None:
    """Zero in x (b, h, n, G·L, S+M+L) what lies beyond the window and is not cached."""
    bubble = x.unflatten(3, (plan.groups, plan.L))[..., plan.cached : plan.cached + plan.L]
    bubble.mul_(x.new_ones(plan.L, plan.L).triu())
