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
    p, _, _ = probabilities(x, at, plan, counts, buffers)
    p = buffers.narrowed("p", p)
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
    p, q, keys = probabilities(x, at, plan, counts, buffers)
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
        running = cache_backward(grads.v, d_values[..., :S, :], counts, running, at, plan)
        d_values = d_values[..., S:, :]
    add_strips(grads.v, d_values, at, plan, skip)

    if has_far(x, at, plan):
        d_near = buffers.narrow("d_near", *p.shape[:4], p.shape[4] - S).zero_()
        band(d_near, plan).copy_(band(d_logits, plan))
        band(d_logits, plan).zero_()
        d_far = buffers.narrowed("d_logits", d_logits)
        q_near, k_near = query_rows(x.q, at, plan), strips(x.k, at, plan)
        d_q = product(d_near, k_near, buffers("d_q", *q.shape))
        d_q_far = product(d_far, keys, buffers("d_q_far", *q.shape))
        if grads.q_far is None:
            d_q += d_q_far
        else:
            put_query_rows(grads.q_far, d_q_far, at, plan)
        put_query_rows(grads.q, d_q, at, plan)
        pairs = [(grads.k, d_near[..., skip:].mT, q_near)]
        if not windowed:
            assert grads.k_far is not None, "the far side has keys of its own"
            pairs.append((grads.k_far, d_far[..., S + skip :].mT, q))
    else:
        d_logits = buffers.narrowed("d_logits", d_logits)
        put_query_rows(grads.q, product(d_logits, keys, buffers("d_q", *q.shape)), at, plan)
        if windowed:
            clear_bubble(d_logits, plan)
        pairs = [(grads.k, d_logits[..., S + skip :].mT, q)]
    for target, columns, queries in pairs:
        d_k = product(columns, queries, buffers("d_k", *columns.shape[:4], queries.shape[4]))
        add_strips(target, d_k, at, plan, skip)
    return running


def joint_values(x: Inputs, at: Chunk, plan: Plan, cache: Cache, buffers: Buffers) -> tuple[Tensor, Tensor, Cache]:
    """[m_s ; v_j] of each block (b, h, n, S+M+L, V), narrow; counts (b, h, n, S); the cache of the next chunk."""
    exact = strips(x.v, at, plan)
    if plan.cached == 0:
        return exact, cache[0][:, :, None], cache
    values = buffers.narrow("values", *exact.shape[:3], plan.cached + exact.shape[3], exact.shape[4])
    values[:, :, :, plan.cached :] = exact
    counts, totals = cache_prefix(*cache, x.v, at, plan)
    torch.div(totals[:, :, :-1], counts[:, :, :-1, :, None].clamp_min(1), out=values[:, :, :, : plan.cached])
    return values, counts[:, :, :-1], (counts[:, :, -1], totals[:, :, -1])


def joint_keys(k: Tensor, at: Chunk, plan: Plan, buffers: Buffers) -> Tensor:
    """[c_s ; k̂_j] of each block: (b, h, n, S+M+L, K)."""
    exact = strips(k, at, plan)
    keys = buffers.narrow("keys", *exact.shape[:3], plan.cached + exact.shape[3], exact.shape[4])
    keys[:, :, :, : plan.cached] = plan.codebook[at.h, None]
    keys[:, :, :, plan.cached :] = exact
    return keys


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Batched a @ b into `out`, summed in its type, which a and b may be narrower than; axes (b, h, n, ·, ·)."""
    a, b, target = a.flatten(0, 2), b.flatten(0, 2), out.flatten(0, 2)
    if a.dtype == out.dtype:
        torch.bmm(a, b, out=target)
    elif a.device.type == "cuda":
        torch.bmm(a, b, out_dtype=out.dtype, out=target)
    else:
        torch.bmm(a.to(out.dtype), b.to(out.dtype), out=target)
    return out


def softmax_backward(d_p: Tensor, p: Tensor) -> Tensor:
    """P∘(dP − Σ P∘dP) over the last axis, in place of dP: one pass of PyTorch's own, and o need not be kept for it."""
    torch.ops.aten._softmax_backward_data.out(d_p, p, -1, p.dtype, grad_input=d_p)
    return d_p


def has_far(x: Inputs, at: Chunk, plan: Plan) -> bool:
    """Whether pairs beyond the window are seen otherwise than those inside.

    Always with rotary positions or an exact window; else only where carried keys are, which may stem from an older
    codebook.
    """
    return x.q_far is not None or (x.k_far is not None and at.n.start * plan.L < plan.M)


def probabilities(x: Inputs, at: Chunk, plan: Plan, counts: Tensor, buffers: Buffers) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over [cache ; strip]: p (b, h, n, G·L, S+M+L), wide; with the queries and joint keys of the far side."""
    far = has_far(x, at, plan)
    q = query_rows(x.q if x.q_far is None else x.q_far, at, plan)
    keys = joint_keys(x.k_far if far else x.k, at, plan, buffers)  # type: ignore[arg-type]
    logits = product(q, keys.mT, buffers("p", *q.shape[:4], keys.shape[3]))
    if far:
        near = buffers("near", *q.shape[:4], plan.M + plan.L)
        product(query_rows(x.q, at, plan), strips(x.k, at, plan).mT, near)
        band(logits, plan).copy_(band(near, plan))
    if plan.scale is not None:
        logits.mul_(plan.scale)
    if x.bias is not None:
        band(logits, plan).add_(bias_rows(x.bias, at, plan))
    logits[..., : plan.cached].add_(counts.log()[:, :, :, None])
    hide(logits.unflatten(3, (plan.groups, plan.L)), at, plan)
    return torch.softmax(logits, dim=-1, out=logits), q, keys


def clear_bubble(x: Tensor, plan: Plan) -> None:
    """Zero in x (b, h, n, G·L, S+M+L) what lies beyond the window and is not cached."""
    bubble = x.unflatten(3, (plan.groups, plan.L))[..., plan.cached : plan.cached + plan.L]
    bubble.mul_(x.new_ones(plan.L, plan.L).triu())
