"""Exact keys of a strip: which parts it has, and the logits of queries and keys in one of them.

In the strip of a tile of queries, from the oldest key to the newest:

    far       every pair is beyond the window: without position, as the cache sees it
    both      some pairs are inside the window and some beyond
    near      every pair is inside the window and in the past: no mask
    diagonal  inside the window, cut by causality

Where the window makes no difference (no bias, no rotation, a cache behind it) all in front of the diagonal is `near`.
"""

import triton
import triton.language as tl

from transformer_vq.ops.kernels.rows import LOG2E

FAR, BOTH, NEAR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def tile_of_queries(t, T, C: tl.constexpr, BM: tl.constexpr):
    """Tile t of the sequence -> its block n, its first position and the one after its last. Tiles end with blocks."""
    TILES: tl.constexpr = (C + BM - 1) // BM
    n = t // TILES
    first = n * C + t % TILES * BM
    return n, first, tl.minimum(tl.minimum(first + BM, n * C + C), T)


@triton.jit
def parts(begin, first, last, M, BN: tl.constexpr, WINDOWED: tl.constexpr):
    """Ends of `far`, `both` and `near` in the strip of queries first … last, in whole tiles from key `begin` on."""
    far, both = begin, begin
    if WINDOWED:
        far = begin + tl.maximum(first - M - begin, 0) // BN * BN
        both = far + (tl.maximum(last - M - far, 0) + BN - 1) // BN * BN
    return far, both, both + tl.maximum(first + 1 - both, 0) // BN * BN


@triton.jit
def strip_logits(
    q, q_far, k, k_far, i, j, i_ok, j_ok, M, BIAS, bias_at, bias_t, q_run, k_run,
    SCALE: tl.constexpr, TWO: tl.constexpr, SIDE: tl.constexpr, CAUSAL: tl.constexpr, BIASED: tl.constexpr,
    MASKED: tl.constexpr, CACHE: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Base-2 logits of queries i (rows) and keys j (columns), −inf where unseen; and which pairs are in the window.

    TWO: pairs beyond the window are q_far·k_far. MASKED: documents q_run and k_run must agree. bias_at: where the bias
    of the first query begins.
    """
    distance = i[:, None] - j[None, :]
    near = (distance >= 0) & (distance <= M)
    if TWO and SIDE == FAR:
        x = tl.dot(q_far, tl.trans(k_far), input_precision=PREC, out_dtype=ACC) * SCALE
    else:
        x = tl.dot(q, tl.trans(k), input_precision=PREC, out_dtype=ACC) * SCALE
        if TWO and SIDE == BOTH:
            y = tl.dot(q_far, tl.trans(k_far), input_precision=PREC, out_dtype=ACC) * SCALE
            x = tl.where(near, x, y)
    if BIASED and SIDE != FAR:
        mask = near & i_ok[:, None] & j_ok[None, :]
        row = tl.arange(0, i.shape[0])[:, None] * bias_t
        x += tl.load(BIAS + bias_at + (row + distance), mask=mask, other=0.0).to(ACC)
    x *= LOG2E
    if CAUSAL:
        x = tl.where((distance >= 0) & j_ok[None, :], x, float("-inf"))
    elif SIDE == BOTH:
        x = tl.where(j_ok[None, :], x, float("-inf"))
    if not CACHE and SIDE != NEAR:
        x = tl.where(distance <= M, x, float("-inf"))
    if MASKED:
        x = tl.where(q_run[:, None] == k_run[None, :], x, float("-inf"))
    return x, near
