"""VQ attention around another library's flash kernel: the strip is the kernel's, the cache is ours.

    o = Σ_p exp(lse_p − lse) o_p,   lse = log Σ_p exp(lse_p),   p over window, bubble and cache

In the backward pass each part is handed the merged o and lse, so that its P = exp(x − lse) and D = Σ dO∘O are those of
the whole softmax; the sum of the parts' gradients is exact. The strip is one call where all of it is seen and learns
alike: without positions, under the gradient rule `block`. Else the window (a band of M+1 columns) and the bubble (keys
beyond it that are not cached yet) are calls of their own: the bubble sees queries turned by the whole window, and under
the rule `window` its keys learn nothing. Blocks whose strip begins before the call go blockwise's way.

Letters: blocks.py.  Oracle: quadratic.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_vq.config.extras import lack
from transformer_vq.ops.attention import flash_kernels
from transformer_vq.ops.attention.blocks import (
    Buffers,
    Chunk,
    Plan,
    add_strips,
    cache_backward,
    cache_prefix,
    put_query_rows,
    query_rows,
    strips,
)
from transformer_vq.ops.attention.blockwise import Starts, layout, learned_gradients, starts
from transformer_vq.ops.attention.by_hand import by_hand
from transformer_vq.ops.attention.call import Call
from transformer_vq.ops.attention.chunk import Cache, Inputs, chunk_backward, chunk_forward, product
from transformer_vq.ops.attention.flash_kernels import WIDEST, FlashKernel, provider
from transformer_vq.ops.attention.wide import manner


def refusal(device: torch.device | str) -> str | None:
    """Why there is no flash kernel for this device, in one line; None where there is one."""
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        return f"backend flash: needs a GPU or a CPU, and tensors are on {device.type}"
    if provider(device) is None:
        return f"{lack('flash_attn', 'backend flash')}, or take triton or blockwise"  # PyTorch has none either
    return None


def supports(call: Call) -> None:
    """Raise ValueError, in one line, for a call that flash kernels cannot do."""
    K, V, dtype = call.q.shape[-1], call.v.shape[-1], call.common_dtype
    why, on_cuda = refusal(call.q.device), call.q.device.type == "cuda"
    if why is None and call.bias is not None:
        why = "backend flash: its kernels take no bias (positions xl and scalar); take triton, wide or blockwise"
    if why is None and call.run is not None:
        why = "backend flash: its kernels see one document, not segments; take triton, wide or blockwise"
    if why is None and on_cuda and max(K, V) > WIDEST:
        why = f"backend flash: keys and values are at most {WIDEST} wide, not K = {K}, V = {V}; take wide or blockwise"
    if why is None and on_cuda and dtype.itemsize > 2:
        why = f"backend flash: a GPU takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}; take triton"
    if why is not None:
        raise ValueError(why)


def flash(call: Call) -> Tensor:
    """`Call` -> o (B, Hkv, G, T, V). Raises ValueError for what flash kernels cannot do."""
    return by_hand(call, notes, forward, backward)


def notes(call: Call) -> list[Tensor]:
    """For the backward pass: the cache at the start of each chunk, the merged logsumexp, and a narrow o's original."""
    supports(call)
    how, shape = manner(call), call.q.shape[:4]
    lse = call.q.new_zeros(*shape, 1, dtype=call.wide_dtype)  # 0 in chunks that begin in carried keys, not flash's
    made = [*starts(call, how, spare=1), lse]
    for kept in made[:2]:
        kept[-1].zero_()  # the spare chunk is not always there
    return made if call.v.dtype == how.narrow else [*made, call.v.new_empty(*shape, call.v.shape[3], dtype=how.narrow)]


def forward(call: Call, notes: list[Tensor]) -> Tensor:
    """`Call` -> o, and the notes filled."""
    count, total, lse, *_ = notes
    plan, x = layout(call, manner(call))
    kernel, buffers = kernel_for(call), Buffers(plan.total, x.q.dtype)
    o = x.q.new_empty(*x.q.shape[:4], x.v.shape[3])
    for chunks in walk(plan):
        cache = plan.count[chunks[0].b, chunks[0].h], plan.total[chunks[0].b, chunks[0].h]
        for i, at in enumerate(chunks):
            count[i, at.b, at.h], total[i, at.b, at.h] = cache
            if begins_before(at, plan):
                cache = chunk_forward(x, o, at, plan, cache, buffers)
            else:
                cache = strip_forward(kernel, x, o, lse, at, plan, cache, buffers)
    return notes[3].copy_(o) if len(notes) > 3 else o


def backward(call: Call, o: Tensor, notes: list[Tensor], d_o: Tensor) -> list[Tensor]:
    """Gradients of `call.learned()`."""
    kernel, original = kernel_for(call), notes[3] if len(notes) > 3 else o

    def of_inputs(plan: Plan, x: Inputs) -> Inputs:
        return gradients(kernel, plan, x, original, notes[2], d_o.to(x.q.dtype), (notes[0], notes[1]))

    return learned_gradients(call, manner(call), of_inputs)


def gradients(kernel: FlashKernel, plan: Plan, x: Inputs, o: Tensor, lse: Tensor, d_o: Tensor, begun: Starts) -> Inputs:
    """Of the inputs, where they exist, wide, from the last chunk to the first."""
    buffers = Buffers(plan.total, x.q.dtype)
    grads = Inputs(*[None if t is None else torch.zeros_like(t, dtype=plan.total.dtype) for t in x])  # type: ignore[arg-type]
    for chunks in walk(plan):
        running = torch.zeros_like(plan.total[chunks[0].b, chunks[0].h])
        for i, at in reversed(list(enumerate(chunks))):
            cache = begun[0][i, at.b, at.h], begun[1][i, at.b, at.h]
            if begins_before(at, plan):
                running = chunk_backward(x, grads, d_o, at, plan, cache, running, buffers)
            else:
                running = strip_backward(kernel, x, grads, o, lse, d_o, at, plan, cache, running, buffers)
        if grads.total is not None:
            grads.total[chunks[0].b, chunks[0].h] = running
    return grads


def kernel_for(call: Call) -> FlashKernel:
    """The provider, which `supports` has found there."""
    kernel = provider(call.q.device)
    assert kernel is not None, "notes come first, and refuse"
    return kernel


def begins_before(at: Chunk, plan: Plan) -> bool:
    """Whether a strip of this chunk holds carried keys, or slots without a key."""
    start: int = at.n.start
    return start * plan.L < plan.M


def walk(plan: Plan) -> Iterator[list[Chunk]]:
    """Chunks as blockwise's, but those with both kinds of blocks cut in two."""
    early = -(-plan.M // plan.L)
    for chunks in plan.chunks():
        yield [
            at._replace(n=slice(*ends))
            for at in chunks
            for ends in ((at.n.start, min(at.n.stop, early)), (max(at.n.start, early), at.n.stop))
            if ends[0] < ends[1]
        ]


class Part(NamedTuple):
    """One call of the kernel, blocks, rows and heads folded into its batch: (b·h·n, t, heads, width)."""

    q: Tensor
    k: Tensor
    v: Tensor
    window: int | None
    rows: slice
    """Of a block's L queries."""

    def of(self, x: Tensor) -> Tensor:
        """Its rows of x (b·h·n, L, G, D)."""
        return x[:, self.rows]


def parts(x: Inputs, at: Chunk, plan: Plan) -> list[Part]:
    """The strip in one call, or its window, and the bubble if there is one: row r of it sees columns 0 … r−1."""
    L, M = plan.L, plan.M
    k, v = (strips(t, at, plan).flatten(0, 2)[:, :, None] for t in (x.k, x.v))
    q = fold(query_rows(x.q, at, plan), plan)
    if x.q_far is None and plan.gradients == "block" and plan.cached:
        return [Part(q, k, v, None, slice(0, L))]
    found = [Part(q, k, v, M, slice(0, L))]
    if plan.cached and L > 1:
        q = q if x.q_far is None else fold(query_rows(x.q_far, at, plan), plan)
        k = k if x.k_far is None else strips(x.k_far, at, plan).flatten(0, 2)[:, :, None]
        found.append(Part(q[:, 1:], k[:, : L - 1], v[:, : L - 1], None, slice(1, L)))
    return found


def fold(rows: Tensor, plan: Plan) -> Tensor:
    """(b, h, n, G·L, D) -> (b·h·n, L, G, D)."""
    by_group: Tensor = rows.unflatten(3, (plan.groups, plan.L))
    return by_group.transpose(3, 4).flatten(0, 2)


def unfold(x: Tensor, like: Tensor) -> Tensor:
    """The inverse: (b·h·n, L, G, D) -> (b, h, n, G·L, D), for `like` (b, h, n, ·, ·)."""
    rows: Tensor = x.transpose(1, 2).flatten(1, 2).unflatten(0, like.shape[:3])
    return rows


def cached_logits(x: Inputs, at: Chunk, plan: Plan, counts: Tensor, buffers: Buffers) -> tuple[Tensor, Tensor, Tensor]:
    """q·c_s + log n_s (b, h, n, G·L, S), wide, with queries (b, h, 1, n·G·L, K) and codebook (b, h, 1, S, K)."""
    rows = query_rows(x.q if x.q_far is None else x.q_far, at, plan)
    q = rows.flatten(2, 3)[:, :, None]
    codebook = plan.codebook[None, at.h, None].expand(q.shape[0], -1, -1, -1, -1)
    logits = product(q, codebook.mT, buffers("p", *q.shape[:4], plan.cached)).view(*rows.shape[:4], plan.cached)
    if plan.scale is not None:
        logits.mul_(plan.scale)
    return logits.add_(counts.log()[:, :, :, None]), q, codebook


def means_of(cache: Cache, x: Inputs, at: Chunk, plan: Plan, buffers: Buffers) -> tuple[Tensor, Tensor, Cache]:
    """Means (b, h, n, S, V), narrow, and counts (b, h, n, S) of each block; the cache of the next chunk."""
    counts, totals = cache_prefix(*cache, x.v, at, plan, buffers)
    means = buffers.narrow("values", *totals[:, :, :-1].shape)
    torch.div(totals[:, :, :-1], counts[:, :, :-1, :, None].clamp_min(1), out=means)
    return means, counts[:, :, :-1], (counts[:, :, -1].clone(), totals[:, :, -1].clone())


def strip_forward(
    kernel: FlashKernel, x: Inputs, o: Tensor, lse: Tensor, at: Chunk, plan: Plan, cache: Cache, buffers: Buffers
) -> Cache:
    """Write the chunk's rows of o (B, Hkv, G, T, V) and lse (B, Hkv, G, T, 1); returns the next chunk's cache."""
    scale, wide = 1.0 if plan.scale is None else plan.scale, plan.total.dtype
    rows = query_rows(x.q, at, plan)
    found = []
    for part in parts(x, at, plan):
        o_part, lse_part = flash_kernels.attend(kernel, part.q, part.k, part.v, scale, part.window)
        missing = part.rows.start
        lse_part = F.pad(lse_part.to(wide).transpose(1, 2), (0, 0, missing, 0), value=float("-inf"))
        o_part = F.pad(o_part.to(wide), (0, 0, 0, 0, missing, 0))
        found.append((unfold(o_part, rows), unfold(lse_part[..., None], rows)))
    if plan.cached:
        means, counts, cache = means_of(cache, x, at, plan, buffers)
        logits, _, _ = cached_logits(x, at, plan, counts, buffers)
        merged = torch.stack([torch.logsumexp(logits, -1, keepdim=True), *(y for _, y in found)]).logsumexp(0)
        p = buffers.narrowed("p", logits.sub_(merged).exp_())
        whole = product(p, means, buffers("o", *p.shape[:4], means.shape[4]))
    else:
        merged, whole = found[0][1], torch.zeros_like(found[0][0])
    for o_part, lse_part in found:
        whole += o_part * (lse_part - merged).exp()
    put_query_rows(o, whole, at, plan)
    put_query_rows(lse, merged, at, plan)
    return cache


def strip_backward(
    kernel: FlashKernel,
    x: Inputs,
    grads: Inputs,
    o: Tensor,
    lse: Tensor,
    d_o: Tensor,
    at: Chunk,
    plan: Plan,
    cache: Cache,
    running: Tensor,
    buffers: Buffers,
) -> Tensor:
    """Add the gradients of one chunk to `grads`. `running` (b, h, S, V) is R of the next; returns this one's."""
    scale, M, windowed = 1.0 if plan.scale is None else plan.scale, plan.M, plan.gradients == "window"
    skip = 0 if windowed or plan.through else M  # as in chunk.py
    d_rows, o_rows, lse_rows = (query_rows(t, at, plan) for t in (d_o, o, lse))
    folded = [fold(t, plan) for t in (d_rows, o_rows)]
    folded_lse = fold(lse_rows, plan)[..., 0].transpose(1, 2)  # (b·h·n, G, L)
    d_q = []
    for i, part in enumerate(parts(x, at, plan)):
        d_o_part, o_part = (part.of(t) for t in folded)
        dq, dk, dv = flash_kernels.gradients(
            kernel, d_o_part, part.q, part.k, part.v, o_part, folded_lse[:, :, part.rows], scale, part.window
        )
        d_q.append(unfold(F.pad(dq, (0, 0, 0, 0, part.rows.start, 0)), d_rows).to(plan.total.dtype))
        dk, dv = (t[:, skip:, 0].unflatten(0, d_rows.shape[:3]) for t in (dk, dv))
        bubble = i > 0
        if not (bubble and windowed):
            target = grads.k_far if bubble and grads.k_far is not None else grads.k
            add_strips(target, dk, at, plan, skip)
        if plan.through or not (bubble and windowed):
            add_strips(grads.v, dv, at, plan, skip)
    if plan.cached:
        means, counts, _ = means_of(cache, x, at, plan, buffers)
        logits, q, codebook = cached_logits(x, at, plan, counts, buffers)
        p = logits.sub_(lse_rows).exp_()
        wide = plan.total.dtype
        delta = (d_rows.to(wide) * o_rows.to(wide)).sum(-1, keepdim=True)
        d_logits = product(d_rows, means.mT, buffers("d_logits", *p.shape)).sub_(delta).mul_(p).mul_(scale)
        d_logits = buffers.narrowed("d_logits", d_logits).flatten(2, 3)[:, :, None]
        d_q.append(product(d_logits, codebook, buffers("d_q", *q.shape)).view(d_rows.shape[:4] + q.shape[-1:]))
        if plan.through:
            columns = buffers.narrowed("p", p).mT
            d_means = product(columns, d_rows, buffers("d_values", *columns.shape[:4], d_rows.shape[4]))
            running = cache_backward(grads.v, d_means, counts, running, at, plan, buffers)
    if grads.q_far is not None and len(d_q) > 1:
        put_query_rows(grads.q_far, torch.stack(d_q[1:]).sum(0), at, plan)
        d_q = d_q[:1]
    put_query_rows(grads.q, torch.stack(d_q).sum(0), at, plan)
    return running
