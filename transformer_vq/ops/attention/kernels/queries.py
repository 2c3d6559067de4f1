"""Gradient of queries and of the bias: the same walk as forward.py, with dS = P∘(dO·[m;v]ᵀ − D),  D_i = dO_i·O_i."""

import triton
import triton.language as tl

from transformer_vq.ops.attention.kernels.strip import BOTH, FAR, NEAR, parts, strip_logits, tile_of_queries
from transformer_vq.ops.kernels.rows import LOG2E, load_rows, load_table, store_rows


@triton.jit
def pull_strip(
    dq, dq_far, q, q_far, do, lse, delta, Keys, KeysFar, V, KRUN, run_at, shift, b, hk, i, i_ok, q_run, begin, end, M,
    BIAS, bias_at, bias_t, DBIAS, dbias_at,
    K: tl.constexpr, VD: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SCALE: tl.constexpr,
    TWO: tl.constexpr, ROTARY: tl.constexpr, SIDE: tl.constexpr, CAUSAL: tl.constexpr, BIASED: tl.constexpr,
    MASKED: tl.constexpr, CACHE: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add what keys begin … end−1 send to the queries. Without rotation both sides are the same query: one sum."""
    for j0 in range(begin, end, BN):
        j = j0 + tl.arange(0, BN)
        j_ok = j < end
        k_run = j
        if MASKED:
            k_run = tl.load(KRUN + run_at + shift + j, mask=j_ok, other=-3)
        if TWO and SIDE != NEAR:
            k_far = load_rows(KeysFar, b, hk, shift + j0, j_ok, K, BK)
        if TWO and SIDE == FAR:
            k = k_far
        else:
            k = load_rows(Keys, b, hk, shift + j0, j_ok, K, BK)
            if not TWO or SIDE == NEAR:
                k_far = k
        x, near = strip_logits(
            q, q_far, k, k_far, i, j, i_ok, j_ok, M, BIAS, bias_at, bias_t, q_run, k_run,
            SCALE, TWO, SIDE, CAUSAL, BIASED, MASKED, CACHE, PREC, ACC,
        )  # fmt: skip
        v = load_rows(V, b, hk, shift + j0, j_ok, VD, BV)
        ds = tl.dot(do, tl.trans(v), input_precision=PREC, out_dtype=ACC) - delta[:, None]
        ds = tl.exp2(x - lse[:, None]) * ds
        if BIASED and SIDE != FAR:
            row = tl.arange(0, i.shape[0])[:, None] * (M + 1)
            at = DBIAS + dbias_at + (row + i[:, None] - j[None, :])
            tl.store(at, ds.to(DBIAS.dtype.element_ty), mask=near & i_ok[:, None] & j_ok[None, :])
        if TWO and SIDE == BOTH:
            inside, beyond = tl.where(near, ds, 0.0).to(k.dtype), tl.where(near, 0.0, ds).to(k.dtype)
            dq = tl.dot(inside, k, dq, input_precision=PREC, out_dtype=ACC)
            if ROTARY:
                dq_far = tl.dot(beyond, k_far, dq_far, input_precision=PREC, out_dtype=ACC)
            else:
                dq = tl.dot(beyond, k_far, dq, input_precision=PREC, out_dtype=ACC)
        elif TWO and SIDE == FAR and ROTARY:
            dq_far = tl.dot(ds.to(k.dtype), k, dq_far, input_precision=PREC, out_dtype=ACC)
        else:
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PREC, out_dtype=ACC)
    return dq, dq_far


@triton.jit(do_not_specialize=["T", "N", "tile0"])
def queries_kernel(
    Q, QFar, Keys, KeysFar, V, PKeys, PKeysFar, PV, PRUN, RUN, CODEBOOK, LOGN, MEAN, FILLED,
    BIAS, bias_b, bias_h, bias_t, Out, LSE, DO, DELTA, DQ, DQFar, DBIAS, T, M, S, N, tile0, slice0, slice_len,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, VD: tl.constexpr, C: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SCALE: tl.constexpr, ROTARY: tl.constexpr,
    PAST: tl.constexpr, BIASED: tl.constexpr, RUNS: tl.constexpr, CACHE: tl.constexpr, SPLIT: tl.constexpr,
    PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, H, B), from tile `tile0` -> DQ, DQFar (B, H, T, K) and DELTA (B, H, T); arguments as in forward.py.

    DBIAS (B, H, slice_len, M+1) holds the rows of positions slice0 …; entries without a key are not written.
    """
    t, h, b = tile0 + tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    HK: tl.constexpr = H // G
    hk = h // G
    bk = b * HK + hk
    n, first, stop = tile_of_queries(t, T, C, BM)
    i = first + tl.arange(0, BM)
    i_ok = i < stop
    q = load_rows(Q, b, h, first, i_ok, K, BK)
    q_far = q
    if ROTARY:
        q_far = load_rows(QFar, b, h, first, i_ok, K, BK)
    q_run = tl.zeros([BM], tl.int32)
    if RUNS:
        q_run = tl.load(RUN + b * T + i, mask=i_ok, other=-2)
    do = load_rows(DO, b, h, first, i_ok, VD, BV)
    o = load_rows(Out, b, h, first, i_ok, VD, BV)
    delta = tl.sum(do.to(ACC) * o.to(ACC), 1)
    tl.store(DELTA + (b * H + h) * T + i, delta, mask=i_ok)
    lse = tl.load(LSE + (b * H + h) * T + i, mask=i_ok, other=float("inf"))
    bias_at = b * bias_b + h * bias_h + tl.cast(first, tl.int64) * bias_t
    dbias_at = ((b * H + h) * slice_len + first - slice0) * (M + 1)
    dq = tl.zeros([BM, BK], ACC)
    dq_far = dq

    if CACHE:
        for s0 in range(0, tl.load(FILLED + bk * N + n), BN):
            s = s0 + tl.arange(0, BN)
            s_ok = s < S
            c = load_table(CODEBOOK, hk * S, s, s_ok, K, BK)
            log_count = tl.load(LOGN + (bk * N + n) * S + s, mask=s_ok, other=float("-inf"))
            x = tl.dot(q_far, tl.trans(c), input_precision=PREC, out_dtype=ACC) * (SCALE * LOG2E) + log_count[None, :]
            if RUNS:
                x = tl.where((q_run == tl.load(RUN + b * T + n * C))[:, None], x, float("-inf"))
            mean = load_table(MEAN, (bk * N + n) * S, s, s_ok, VD, BV)
            ds = tl.dot(do, tl.trans(mean), input_precision=PREC, out_dtype=ACC) - delta[:, None]
            ds = (tl.exp2(x - lse[:, None]) * ds).to(c.dtype)
            if ROTARY:
                dq_far = tl.dot(ds, c, dq_far, input_precision=PREC, out_dtype=ACC)
            else:
                dq = tl.dot(ds, c, dq, input_precision=PREC, out_dtype=ACC)

    begin = n * C - M
    if not CACHE:
        begin = first - M
    if PAST:
        dq, dq_far = pull_strip(
            dq, dq_far, q, q_far, do, lse, delta, PKeys, PKeysFar, PV, PRUN, b * M, M, b, hk, i, i_ok, q_run,
            tl.maximum(begin, -M), 0, M, BIAS, bias_at, bias_t, DBIAS, dbias_at,
            K, VD, BN, BK, BV, SCALE, True, ROTARY, BOTH, False, BIASED, True, CACHE, PREC, ACC,
        )  # fmt: skip
    begin = tl.maximum(begin, 0)
    WINDOWED: tl.constexpr = ROTARY or BIASED or not CACHE
    if SPLIT:
        far, both, near = parts(begin, first, stop - 1, M, BN, WINDOWED)
        if WINDOWED:
            if CACHE:
                dq, dq_far = pull_strip(
                    dq, dq_far, q, q_far, do, lse, delta, Keys, KeysFar, V, RUN, b * T, 0, b, hk, i, i_ok, q_run,
                    begin, far, M, BIAS, bias_at, bias_t, DBIAS, dbias_at,
                    K, VD, BN, BK, BV, SCALE, ROTARY, ROTARY, FAR, False, BIASED, RUNS, CACHE, PREC, ACC,
                )  # fmt: skip
            dq, dq_far = pull_strip(
                dq, dq_far, q, q_far, do, lse, delta, Keys, KeysFar, V, RUN, b * T, 0, b, hk, i, i_ok, q_run,
                far, tl.minimum(both, stop), M, BIAS, bias_at, bias_t, DBIAS, dbias_at,
                K, VD, BN, BK, BV, SCALE, ROTARY, ROTARY, BOTH, True, BIASED, RUNS, CACHE, PREC, ACC,
            )  # fmt: skip
        dq, dq_far = pull_strip(
            dq, dq_far, q, q_far, do, lse, delta, Keys, KeysFar, V, RUN, b * T, 0, b, hk, i, i_ok, q_run,
            both, near, M, BIAS, bias_at, bias_t, DBIAS, dbias_at,
            K, VD, BN, BK, BV, SCALE, ROTARY, ROTARY, NEAR, False, BIASED, RUNS, CACHE, PREC, ACC,
        )  # fmt: skip
        dq, dq_far = pull_strip(
            dq, dq_far, q, q_far, do, lse, delta, Keys, KeysFar, V, RUN, b * T, 0, b, hk, i, i_ok, q_run,
            near, stop, M, BIAS, bias_at, bias_t, DBIAS, dbias_at,
            K, VD, BN, BK, BV, SCALE, ROTARY, ROTARY, NEAR, True, BIASED, RUNS, CACHE, PREC, ACC,
        )  # fmt: skip
    else:
        dq, dq_far = pull_strip(
            dq, dq_far, q, q_far, do, lse, delta, Keys, KeysFar, V, RUN, b * T, 0, b, hk, i, i_ok, q_run,
            begin, stop, M, BIAS, bias_at, bias_t, DBIAS, dbias_at,
            K, VD, BN, BK, BV, SCALE, ROTARY, ROTARY, BOTH if WINDOWED else NEAR, True, BIASED, RUNS, CACHE, PREC, ACC,
        )  # fmt: skip
    store_rows(DQ, b, h, first, i_ok, dq * SCALE, K, BK)
    if ROTARY:
        store_rows(DQFar, b, h, first, i_ok, dq_far * SCALE, K, BK)
