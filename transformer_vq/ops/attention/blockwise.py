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
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_vq.ops.attention.block_length import longest_alone
from transformer_vq.ops.attention.blocks import Buffers, Chunk, Plan, blocks_of_chunk, rows_at_once
from transformer_vq.ops.attention.by_hand import by_hand
from transformer_vq.ops.attention.call import Call
from transformer_vq.ops.attention.chunk import Inputs, chunk_backward, chunk_forward
from transformer_vq.ops.attention.rotary import positioned
from transformer_vq.ops.threads import outer_threads, share

LONGEST_BLOCK = 128
"""Under `gradients="window"` nothing depends on L, and longer blocks only add keys of the future to each strip.

But a single block before which nothing was: it needs no means, and is as long as that pays."""

WORTH_A_THREAD = 2**20
"""Logits for each thread, below which handing them over is not worth the while."""


class Manner(NamedTuple):
    """How a call is worked; none of it shows in the result."""

    narrow: torch.dtype
    """What enters products: the call's wide type, or 16 bits."""
    L: int
    """Length of a block."""
    rows: int
    """Queries that are worked on together."""
    means: bool = True
    """False: no key is left of a strip, so none are made."""
    raw: bool = False
    """True: scale and rotary positions are left to who works it."""


def manner(call: Call) -> Manner:
    """All of it wide."""
    L = block_length(call, LONGEST_BLOCK)
    return Manner(call.wide_dtype, L, rows_at_once(call.q.device), not alone(call, L))


def block_length(call: Call, longest: int) -> int:
    """L: `longest` counts where L is free."""
    L = max(1, min(call.block_len, call.q.shape[3]))
    dear = call.gradients == "window" and not (alone(call, L) and call.q.shape[3] <= longest_one(call))
    return min(L, longest) if dear else L


def alone(call: Call, L: int) -> bool:
    """Whether blocks of L are one block, with nothing before it."""
    return call.fresh and not call.linked and call.q.shape[3] <= L


def longest_one(call: Call) -> int:
    """Up to how many tokens that pays."""
    _, _, G, _, K = call.q.shape
    S, two_sided = call.codebook.shape[1] if call.cache else 0, call.rotary is not None or call.exact_window
    return longest_alone(S, call.window, G, K, call.v.shape[3], two_sided)


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
    S, V, wide = call.codebook.shape[1] if call.cache and how.means else 0, call.v.shape[3], call.wide_dtype
    return call.v.new_empty(chunks, B, Hkv, S, dtype=wide), call.v.new_empty(chunks, B, Hkv, S, V, dtype=wide)


def learned_gradients(call: Call, how: Manner, of_inputs: Callable[[Plan, Inputs], Inputs]) -> list[Tensor]:
    """Gradients of `call.learned()`: those of the inputs, through what `layout` did to the arguments."""
    call = call.with_leaves()
    with torch.enable_grad():
        plan, x = layout(call, how)
    inputs = Inputs(*(None if t is None else t.detach() for t in x))  # type: ignore[arg-type]
    grads = of_inputs(replace(plan, total=plan.total.detach()), inputs)
    pairs = [(t, g) for t, g in zip(x, grads, strict=True) if t is not None and g is not None and t.requires_grad]
    outputs, given = [t for t, _ in pairs], [g.to(t.dtype) for t, g in pairs]
    return list(torch.autograd.grad(outputs, call.learned(), given, materialize_grads=True))


def layout(call: Call, how: Manner) -> tuple[Plan, Inputs]:
    """What gets no gradient, and what does: with carried keys in front and whole blocks."""
    call = call.wide() if how.narrow == call.wide_dtype and not how.raw else call.of_type(how.narrow)
    M, T, L = call.window, call.q.shape[3], how.L
    N = -(-T // L)
    missing = N * L - T

    def pad(keys: Tensor) -> Tensor:
        return F.pad(keys, (0, 0, 0, missing)) if missing else keys

    q, q_far, k = (call.q, call.q, call.k_with_carried) if how.raw else positioned(call)
    turned = call.rotary is not None and not how.raw
    two_sided = turned or call.exact_window or not (call.fresh or call.linked)
    k_far = pad(call.k_beyond_window) if two_sided else None

    S = call.codebook.shape[1] if call.cache and how.means else 0
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
        beyond=call.cache,
        scale=call.scale,
        gradients=call.gradients,
        through=call.grad_through_cache,
    )
    q_beyond = None if q_far is q and not call.exact_window else q_far
    total = plan.total if call.linked else None
    return plan, Inputs(q, q_beyond, pad(k), k_far, pad(call.v_with_carried), call.bias, total)


class Share(NamedTuple):
    """What one thread works on by itself: chunks of some rows and key heads, of all query heads or a slice of them."""

    plan: Plan
    groups: slice
    """Of query heads a key head."""
    chunks: list[list[Chunk]]


def shares(plan: Plan, x: Inputs) -> tuple[list[Share], int]:
    """The work in pieces that share nothing but what they read, and the threads to share them.

    Pieces of different query heads do share the gradients of keys and values, see `gradients`. One thread, with all of
    PyTorch's inside each operation, where there is little to do or no even division.
    """
    B, Hkv, G = x.q.shape[:3]
    everything = slice(0, G)
    threads = outer_threads(x.q)
    if threads == 1 or plan.N * plan.L * B * Hkv * G * (plan.cached + plan.M + plan.L) < WORTH_A_THREAD * threads:
        return [Share(plan, everything, [chunks]) for chunks in plan.chunks()], 1
    common = x.bias is not None and x.bias.shape[0] == 1 < B  # a bias of all rows gets gradient from one at a time
    lists = B * Hkv if not common else Hkv
    parts = next((p for p in range(1, G + 1) if G % p == 0 and fair(lists * p, threads)), None)
    if parts is None:
        return [Share(plan, everything, [chunks]) for chunks in plan.chunks()], 1
    heads = G // parts
    narrowed = replace(plan, groups=heads, rows=max(1, plan.rows // parts))  # as many blocks in a chunk as before
    found: dict[tuple[int, int], list[list[Chunk]]] = {}
    for chunks in narrowed.chunks(threads if parts == 1 and not common else B * Hkv):
        b, h = chunks[0].b, chunks[0].h
        found.setdefault((-1 if common else b.start, h.start), []).append(chunks)
    slices = [slice(g, g + heads) for g in range(0, G, heads)]
    return [Share(narrowed, part, chunks) for chunks in found.values() for part in slices], threads


def fair(pieces: int, threads: int) -> bool:
    """Whether that many pieces of one size keep so many threads busy for most of the time."""
    return pieces % threads == 0 or pieces >= 4 * threads


def attend(plan: Plan, x: Inputs, begun: Starts) -> Tensor:
    """o (B, Hkv, G, T, V), in the type of products; fills `begun`."""
    o = x.q.new_empty(*x.q.shape[:4], x.v.shape[3])
    pieces, threads = shares(plan, x)

    def begin() -> Callable[[Share], None]:
        buffers = Buffers(plan.total, x.q.dtype)

        def work(piece: Share) -> None:
            mine, theirs = x.of_groups(piece.groups), o[:, :, piece.groups]
            for chunks in piece.chunks:
                cache = plan.count[chunks[0].b, chunks[0].h], plan.total[chunks[0].b, chunks[0].h]
                for i, at in enumerate(chunks):
                    if piece.groups.start == 0:
                        begun[0][i, at.b, at.h], begun[1][i, at.b, at.h] = cache
                    cache = chunk_forward(mine, theirs, at, piece.plan, cache, buffers)

        return work

    share(pieces, begin, threads)
    return o


def gradients(plan: Plan, x: Inputs, d_o: Tensor, begun: Starts) -> Inputs:
    """Gradients of the inputs, where they exist, wide, from the last chunk to the first.

    Each slice of query heads adds to gradients of keys, values and sums of its own; these are summed in their order.
    """
    d_o = d_o.to(x.q.dtype)
    if 0 in d_o.stride():  # that of a sum: batched products want rows with a stride
        d_o = d_o.contiguous()
    zeros = [None if t is None else torch.zeros_like(t, dtype=plan.total.dtype) for t in x]
    grads = Inputs(*zeros)  # type: ignore[arg-type]
    pieces, threads = shares(plan, x)
    of_slice = {0: grads}
    for piece in pieces:
        if piece.groups.start not in of_slice:
            of_slice[piece.groups.start] = grads.with_own_keys()

    def begin() -> Callable[[Share], None]:
        buffers = Buffers(plan.total, x.q.dtype)

        def work(piece: Share) -> None:
            mine, theirs = x.of_groups(piece.groups), of_slice[piece.groups.start].of_groups(piece.groups)
            for chunks in piece.chunks:
                running = torch.zeros_like(plan.total[chunks[0].b, chunks[0].h])
                for i, at in reversed(list(enumerate(chunks))):
                    cache = begun[0][i, at.b, at.h], begun[1][i, at.b, at.h]
                    slope = d_o[:, :, piece.groups]
                    running = chunk_backward(mine, theirs, slope, at, piece.plan, cache, running, buffers)
                if theirs.total is not None:
                    theirs.total[chunks[0].b, chunks[0].h] = running

        return work

    share(pieces, begin, threads)
    for first, more in sorted(of_slice.items()):
        if first:
            grads.add_keys(more)
    return grads
