"""Gradient of keys and values: for each value what its code has swept up (sweep.py), and what exact pairs send."""

import triton
import triton.language as tl

from transformer_vq.ops.kernels.rows import LOG2E, load_rows, load_table, store_rows

WINDOW, STRIP, OWN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Which exact pairs send gradient: those in the window | in the strip of the query's block | in the block itself."""


@triton.jit
def push_queries(
    dk, dk_far, dv, k, k_far, v, j, j_ok, k_run, Q, QFar, DO, LSE, DELTA, RUN, BIAS, bias_at, bias_t, b, h, bh,
    begin, end, T, M,
    K: tl.constexpr, VD: tl.constexpr, C: tl.constexpr, L: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, SCALE: tl.constexpr, INSIDE: tl.constexpr, ROTARY: tl.constexpr, BIASED: tl.constexpr,
    RUNS: tl.constexpr, CACHE: tl.constexpr, KLIVE: tl.constexpr, VLIVE: tl.constexpr, PREC: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Add what queries begin … end−1 of head h send. INSIDE: every pair is in the window and in the past.

    Blocks of the gradient rule have L queries, those of the cache C, a multiple of L.
    """
    for i0 in range(begin, end, BM):
        i = i0 + tl.arange(0, BM)
        i_ok = i < T
        q = load_rows(Q, b, h, i0, i_ok, K, BK)
        distance = i[None, :] - j[:, None]
        near = (distance >= 0) & (distance <= M)
        x = tl.dot(k, tl.trans(q), input_precision=PREC, out_dtype=ACC) * SCALE
        if ROTARY and not INSIDE:
            q_far = load_rows(QFar, b, h, i0, i_ok, K, BK)
            y = tl.dot(k_far, tl.trans(q_far), input_precision=PREC, out_dtype=ACC) * SCALE
            x = tl.where(near, x, y)
        if BIASED:
            mask = near & i_ok[None, :] & j_ok[:, None]
            row = BIAS + bias_at + tl.cast(i0, tl.int64) * bias_t
            at = row + (tl.arange(0, BM)[None, :] * bias_t + distance)
            x += tl.load(at, mask=mask, other=0.0).to(ACC)
        lse = tl.load(LSE + bh * T + i, mask=i_ok, other=float("inf"))
        if not INSIDE:
            seen = (distance >= 0) & (j[:, None] >= i[None, :] // C * C - M)
            if not CACHE:
                seen = near
            x = tl.where(seen, x, float("-inf"))
        if RUNS:
            q_run = tl.load(RUN + b * T + i, mask=i_ok, other=-2)
            x = tl.where(q_run[None, :] == k_run[:, None], x, float("-inf"))
        p = tl.exp2(x * LOG2E - lse[None, :])
        start = i[None, :] // L * L
        do = load_rows(DO, b, h, i0, i_ok, VD, BV)
        delta = tl.load(DELTA + bh * T + i, mask=i_ok, other=0.0)
        sent = p
        if VLIVE == WINDOW and not INSIDE:
            sent = tl.where(near, p, 0.0)
        if VLIVE == OWN:
            sent = tl.where(j[:, None] >= start, p, 0.0)
        dv = tl.dot(sent.to(do.dtype), do, dv, input_precision=PREC, out_dtype=ACC)
        ds = p * (tl.dot(v, tl.trans(do), input_precision=PREC, out_dtype=ACC) - delta[None, :])
        if KLIVE == OWN:
            ds = tl.where(j[:, None] >= start, ds, 0.0)
        if KLIVE == STRIP and not INSIDE:
            ds = tl.where(j[:, None] >= start - M, ds, 0.0)
        if (ROTARY or KLIVE == WINDOW) and not INSIDE:
            if ROTARY and KLIVE != WINDOW:
                beyond = tl.where(near, 0.0, ds).to(q.dtype)
                dk_far = tl.dot(beyond, q_far, dk_far, input_precision=PREC, out_dtype=ACC)
            ds = tl.where(near, ds, 0.0)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PREC, out_dtype=ACC)
    return dk, dk_far, dv


@triton.jit(do_not_specialize=["T", "N", "groups"])
def keys_kernel(
    Q, QFar, Keys, KeysFar, V, CODES, RUN, BIAS, bias_b, bias_h, bias_t, LSE, DO, DELTA, R, CARRY, DK, DKFar, DV,
    T, M, S, N, groups,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, VD: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
    U: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SCALE: tl.constexpr,
    ROTARY: tl.constexpr, BIASED: tl.constexpr, RUNS: tl.constexpr, CACHE: tl.constexpr, SWEPT: tl.constexpr,
    KLIVE: tl.constexpr, VLIVE: tl.constexpr, SPLIT: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of BN keys, Hkv, B) -> DK, DKFar (B, Hkv, T, K) and DV (B, Hkv, T, V), for keys of this call.

    Keys are the rows of every product: fewer than 64 rows would miss the fast matrix instruction of sm_90.
    """
    u, hk, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    HK: tl.constexpr = H // G
    bk = b * HK + hk
    first = u * BN
    j = first + tl.arange(0, BN)
    j_ok = j < T
    k_run = j
    if RUNS:
        k_run = tl.load(RUN + b * T + j, mask=j_ok, other=-3)
    dv = tl.zeros([BN, BV], ACC)
    if SWEPT:  # first, while registers are free
        enters = (j + M) // C + 1  # the first block that sees key j through the cache
        live = j_ok & (enters < N)
        group = enters // U
        z = tl.load(CODES + bk * T + j, mask=j_ok, other=0).to(tl.int32)
        flows = live
        if RUNS:
            document = tl.load(RUN + b * T + enters * C, mask=live, other=-4)
            live = live & (document == k_run)
            ahead = tl.minimum(group * U + U, N) - 1
            flows = live & (tl.load(RUN + b * T + ahead * C, mask=live, other=-5) == document)
            after = tl.minimum(ahead + 1, N - 1)
            flows = flows & (tl.load(RUN + b * T + after * C, mask=live, other=-5) == document)
        soonest = (first + M) // C + 1
        dv += load_table(R, (bk * N + soonest) * S, (enters - soonest) * S + z, live, VD, BV)
        soonest = soonest // U
        dv += load_table(CARRY, (bk * groups + soonest) * S, (group - soonest) * S + z, flows, VD, BV)
    k = load_rows(Keys, b, hk, first, j_ok, K, BK)
    k_far = k
    if ROTARY:
        k_far = load_rows(KeysFar, b, hk, first, j_ok, K, BK)
    v = load_rows(V, b, hk, first, j_ok, VD, BV)
    dk = tl.zeros([BN, BK], ACC)
    dk_far = dk

    last = first + BN - 1
    end = last + M + 1
    if CACHE and (KLIVE == STRIP or VLIVE == STRIP):  # noqa: PLR1714 - no tuples of constants in kernels
        end = ((last + M) // C + 1) * C
    if KLIVE == OWN:
        end = (last // L + 1) * L
    end = tl.minimum(end, T)
    inside = first + (BN - 1 + BM - 1) // BM * BM  # from here on no query precedes a key
    beyond = first
    if SPLIT:
        beyond = inside + tl.maximum(first + M + 1 - inside, 0) // BM * BM
    for g in range(0, G):
        h = hk * G + g
        bh = b * H + h
        bias_at = b * bias_b + h * bias_h
        if SPLIT:
            dk, dk_far, dv = push_queries(
                dk, dk_far, dv, k, k_far, v, j, j_ok, k_run, Q, QFar, DO, LSE, DELTA, RUN, BIAS, bias_at, bias_t, b, h,
                bh, first, tl.minimum(inside, end), T, M, K, VD, C, L, BM, BK, BV, SCALE,
                False, ROTARY, BIASED, RUNS, CACHE, KLIVE, VLIVE, PREC, ACC,
            )  # fmt: skip
            dk, dk_far, dv = push_queries(
                dk, dk_far, dv, k, k_far, v, j, j_ok, k_run, Q, QFar, DO, LSE, DELTA, RUN, BIAS, bias_at, bias_t, b, h,
                bh, inside, tl.minimum(beyond, end), T, M, K, VD, C, L, BM, BK, BV, SCALE,
                True, ROTARY, BIASED, RUNS, CACHE, KLIVE, VLIVE, PREC, ACC,
            )  # fmt: skip
        dk, dk_far, dv = push_queries(
            dk, dk_far, dv, k, k_far, v, j, j_ok, k_run, Q, QFar, DO, LSE, DELTA, RUN, BIAS, bias_at, bias_t, b, h, bh,
            beyond, end, T, M, K, VD, C, L, BM, BK, BV, SCALE,
            False, ROTARY, BIASED, RUNS, CACHE, KLIVE, VLIVE, PREC, ACC,
        )  # fmt: skip
    store_rows(DK, b, hk, first, j_ok, dk * SCALE, K, BK)
    if ROTARY:
        store_rows(DKFar, b, hk, first, j_ok, dk_far * SCALE, K, BK)
    store_rows(DV, b, hk, first, j_ok, dv, VD, BV)
