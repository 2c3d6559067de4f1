"""What happens inside one chunk of blocks: softmax over [cache ; strip] and its gradients, in batched products.

    forward    X = Q [c ; k̂]ᵀ,  P = softmax(X + bias + log n),  O = P [m ; v]
    backward   dP = dO [m ; v]ᵀ,  dX = P∘(dP − Σ P∘dP),  dQ = dX [c ; k̂],  d[c ; k̂] = dXᵀ Q,  d[m ; v] = Pᵀ dO

What enters a product is narrow: 16-bit, or as wide as all the rest. Everything else is wide: logits, softmax, counts,
sums, gradients, and what a product adds up in.

Axes:  b, h, n rows, key heads, blocks of a chunk  G queries a key head  K, V widths  S codes  M window  L block
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from transformer_vq.ops.attention.blocks import (
    Buffers,
    Chunk,
    Plan,
    add_bias_grad,
    add_strips,
    band,
    bias_rows,
    cache_backward,
    cache_prefix,
    hide,
    put_query_rows,
    query_rows,
    strips,
)


class Inputs(NamedTuple):
    """What gets gradient; narrow, but for the bias. `far`: how a pair beyond the window is seen; None: as inside."""

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
    total: Tensor | None = None
    """(B, Hkv, S, V), wide: the plan's, where gradient flows to the state."""

    def of_groups(self, groups: slice) -> Inputs:
        """Views of what belongs to a slice of the query heads a key head, and all of the keys and values."""
        q, q_far, bias = (None if t is None else t[:, :, groups] for t in (self.q, self.q_far, self.bias))
        assert q is not None
        return self._replace(q=q, q_far=q_far, bias=bias)

    def with_own_keys(self) -> Inputs:
        """The same with zeros of its own for keys, values and the state's sums."""
        own = (self.k, self.k_far, self.v, self.total)
        k, k_far, v, total = (None if t is None else torch.zeros_like(t) for t in own)
        assert k is not None and v is not None
        return self._replace(k=k, k_far=k_far, v=v, total=total)

    def add_keys(self, more: Inputs) -> None:
        """Add another's keys, values and sums, in place."""
        pairs = ((self.k, more.k), (self.k_far, more.k_far), (self.v, more.v), (self.total, more.total))
        for mine, other in pairs:
            if mine is not None and other is not None:
                mine.add_(other)


Cache = tuple[Tensor, Tensor]
"""Counts (b, h, S) and sums (b, h, S, V) of the keys left of a strip, wide."""


def chunk_forward(x: Inputs, o: Tensor, at: Chunk, plan: Plan, cache: Cache, buffers: Buffers) -> Cache:
    """Write the chunk's rows of o (B, Hkv, G, T, V), given the cache that it begins with; returns the next one's."""
    values, counts, cache = joint_values(x, at, plan, cache, buffers)
    p = buffers.narrowed("p", probabilities(Rows.of(x, at, plan), x.bias, at, plan, counts, buffers))
    put_query_rows(o, product(p, values, buffers("o", *p.shape[:4], values.shape[4])), at, plan)
    return cache


def chunk_backward(
    x: Inputs, grads: Inputs, d_o: Tensor, at: Chunk, plan: Plan, cache: Cache, running: Tensor, buffers: Buffers
) -> Tensor:
    """Add the gradients of one chunk to `grads`, wide. d_o (B, Hkv, G, T, V) is narrow.

    `running` (b, h, S, V) is R of the next chunk; returns this one's.
    """
    S, M = plan.cached, plan.M
    values, counts, _ = joint_values(x, at, plan, cache, buffers)
    rows = Rows.of(x, at, plan)
    p = probabilities(rows, x.bias, at, plan, counts, buffers)
    d_rows = query_rows(d_o, at, plan)
    d_logits = softmax_backward(product(d_rows, values.mT, buffers("d_logits", *p.shape)), p)
    if grads.bias is not None:
        add_bias_grad(grads.bias, band(d_logits, plan), at, plan)
    if plan.scale is not None:
        d_logits.mul_(plan.scale)

    windowed = plan.gradients == "window"
    skip = 0 if windowed or plan.through else M  # rule "block" without cache gradient: only the block's own keys
    if windowed and not plan.through:
        clear_bubble(p, plan)
    through_cache = plan.through and S > 0
    first = 0 if through_cache else S + skip
    columns = buffers.narrowed("p", p)[..., first:].mT
    d_values = product(columns, d_rows, buffers("d_values", *columns.shape[:4], d_rows.shape[4]))
    if through_cache:
        running = cache_backward(grads.v, d_values[..., :S, :], counts, running, at, plan, buffers)
        d_values = d_values[..., S:, :]
    add_strips(grads.v, d_values, at, plan, skip)

    d_q, d_bubble = buffers("d_q", *rows.q.shape), None
    if rows.bubble is not None:
        d_bubble = buffers.narrow("bubble", *p.shape[:4], plan.L)
        d_bubble.copy_(d_logits[..., S : S + plan.L])
        d_bubble.unflatten(3, (plan.groups, plan.L)).mul_(d_bubble.new_ones(plan.L, plan.L).tril(-1))
        clear_bubble(d_logits, plan)
    d_logits = buffers.narrowed("d_logits", d_logits)
    product(d_logits[..., S:], rows.keys, d_q)
    if plan.beyond:
        d_far = d_q if x.q_far is None else buffers("d_q_far", *d_q.shape)
        if S:
            cached = d_logits[..., :S].flatten(2, 3)[:, :, None]
            product(cached, rows.codebook, d_far.flatten(2, 3)[:, :, None], add=d_far is d_q)
        if d_bubble is not None and rows.bubble is not None:
            product(d_bubble, rows.bubble, d_far, add=S > 0 or d_far is d_q)
        if grads.q_far is not None:
            put_query_rows(grads.q_far, d_far, at, plan)
    put_query_rows(grads.q, d_q, at, plan)

    if windowed and d_bubble is None:
        clear_bubble(d_logits, plan)
    pairs = [(grads.k, d_logits[..., S + skip :], rows.q)]
    if d_bubble is not None and not windowed and skip < plan.L:
        assert grads.k_far is not None, "the far side has keys of its own"
        pairs.append((grads.k_far, d_bubble[..., skip:], rows.q_far))
    for target, columns, queries in pairs:
        d_k = product(columns.mT, queries, buffers("d_k", *columns.shape[:3], columns.shape[4], queries.shape[4]))
        add_strips(target, d_k, at, plan, skip)
    return running


class Rows(NamedTuple):
    """What meets in the logits of a chunk, narrow."""

    q: Tensor
    """(b, h, n, G·L, K): queries as they meet keys inside the window."""
    q_far: Tensor
    """As they meet those beyond it."""
    codebook: Tensor
    """(b, h, 1, S, K)."""
    keys: Tensor
    """(b, h, n, M+L, K): of the strip, an overlapping view."""
    bubble: Tensor | None
    """(b, h, n, L, K): keys that the strip may hold beyond the window, where they are seen otherwise than those inside.

    That is with rotary positions or an exact window, and where carried keys are, which may stem from an older codebook.
    Without a cache nothing beyond the window is seen.
    """

    @staticmethod
    def of(x: Inputs, at: Chunk, plan: Plan) -> Rows:
        """Cut them out."""
        q = query_rows(x.q, at, plan)
        two_sided = x.q_far is not None or (x.k_far is not None and at.n.start * plan.L < plan.M)
        bubble = None
        if two_sided and plan.beyond:
            assert x.k_far is not None, "the far side has keys of its own"
            bubble = strips(x.k_far, at, plan)[..., : plan.L, :]
        return Rows(
            q=q,
            q_far=q if x.q_far is None else query_rows(x.q_far, at, plan),
            codebook=plan.codebook[None, at.h, None].expand(q.shape[0], -1, -1, -1, -1),
            keys=strips(x.k, at, plan),
            bubble=bubble,
        )


def joint_values(x: Inputs, at: Chunk, plan: Plan, cache: Cache, buffers: Buffers) -> tuple[Tensor, Tensor, Cache]:
    """[m_s ; v_j] of each block (b, h, n, S+M+L, V), narrow; counts (b, h, n, S); the cache of the next chunk."""
    exact = strips(x.v, at, plan)
    if plan.cached == 0:
        return exact, cache[0][:, :, None], cache
    values = buffers.narrow("values", *exact.shape[:3], plan.cached + exact.shape[3], exact.shape[4])
    values[:, :, :, plan.cached :] = exact
    counts, totals = cache_prefix(*cache, x.v, at, plan, buffers)
    torch.div(totals[:, :, :-1], counts[:, :, :-1, :, None].clamp_min(1), out=values[:, :, :, : plan.cached])
    return values, counts[:, :, :-1], (counts[:, :, -1].clone(), totals[:, :, -1].clone())


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """Batched a @ b into `out`, or added to it, in its type; a and b may be narrower; axes (b, h, n, ·, ·)."""
    a, b, target = a.flatten(0, 2), b.flatten(0, 2), out.flatten(0, 2)
    if a.dtype != out.dtype and a.device.type != "cuda":
        a, b = a.to(out.dtype), b.to(out.dtype)
    if a.dtype != out.dtype:
        made = torch.bmm(a, b, out_dtype=out.dtype)
        target.add_(made) if add else target.copy_(made)
    elif add:
        torch.baddbmm(target, a, b, out=target)
    else:
        torch.bmm(a, b, out=target)
    return out


def softmax_backward(d_p: Tensor, p: Tensor) -> Tensor:
    """P∘(dP − Σ P∘dP) over the last axis, in place of dP: one pass of PyTorch's own, and o need not be kept for it."""
    torch.ops.aten._softmax_backward_data.out(d_p, p, -1, p.dtype, grad_input=d_p)
    return d_p


def probabilities(rows: Rows, bias: Tensor | None, at: Chunk, plan: Plan, counts: Tensor, buffers: Buffers) -> Tensor:
    """Softmax over [cache ; strip]: p (b, h, n, G·L, S+M+L), wide. `bias` is the call's."""
    S, L = plan.cached, plan.L
    logits = buffers("p", *rows.q.shape[:4], S + plan.M + L)
    product(rows.q, rows.keys.mT, logits[..., S:])
    if S:
        cached = logits[..., :S].flatten(2, 3)[:, :, None]
        product(rows.q_far.flatten(2, 3)[:, :, None], rows.codebook.mT, cached)
    if rows.bubble is not None:
        bubble = product(rows.q_far, rows.bubble.mT, buffers("bubble", *rows.q.shape[:4], L))
        place, bubble = (t.unflatten(3, (plan.groups, L)) for t in (logits[..., S : S + L], bubble))
        torch.where(logits.new_ones(L, L, dtype=torch.bool).tril(-1), bubble, place, out=place)
    if plan.scale is not None:
        logits.mul_(plan.scale)
    if bias is not None:
        band(logits, plan).add_(bias_rows(bias, at, plan))
    logits[..., :S].add_(counts.log()[:, :, :, None])
    hide(logits.unflatten(3, (plan.groups, L)), at, plan)
    return torch.softmax(logits, dim=-1, out=logits)


def clear_bubble(x: Tensor, plan: Plan) -> None:
    """Zero in x (b, h, n, G·L, S+M+L) what lies beyond the window and is not cached."""
    bubble = x.unflatten(3, (plan.groups, plan.L))[..., plan.cached : plan.cached + plan.L]
    bubble.mul_(x.new_ones(plan.L, plan.L).triu())
