"""Gradient that values get through the cache, without a gradient of every mean.

Query i gives code s the weight P_is = n_s exp(q_i·c_s − lse_i), and the mean hands 1/n_s of its gradient to each value
in it: n_s falls out. So with R_n = R_{n+1} + Σ over queries i of block n of exp(q_i·c_s − lse_i) dO_i, value j, which
enters the cache at block n, gets R_n of its code. Blocks are swept in groups, all groups at once; what flows from later
groups into an earlier one is added up by `chain`. A sum ends where the document changes.
"""

import triton
import triton.language as tl

from transformer_vq.ops.kernels.rows import LOG2E, load_rows, load_table, store_table


@triton.jit(do_not_specialize=["T", "N"])
def sweep_kernel(
    QFar, CODEBOOK, LOGN, ADDN, RUN, LSE, DO, R, OUT, T, S, N,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, VD: tl.constexpr, C: tl.constexpr, U: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SCALE: tl.constexpr, RUNS: tl.constexpr,
    PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of S, groups of U blocks, B·Hkv) -> R (B, Hkv, N, S, V), sums within the group, and OUT (B, Hkv,
    groups, S, V), what the group hands to the one before it.

    R is written only where a key enters the cache (ADDN, exact counts; a difference of log-counts can round to 0).
    Nothing else is read of it.
    """
    u, p, bk = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    HK: tl.constexpr = H // G
    b, hk = bk // HK, bk % HK
    s = u * BS + tl.arange(0, BS)
    ok = s < S
    c = load_table(CODEBOOK, hk * S, s, ok, K, BK)
    r = tl.zeros([BS, BV], ACC)
    last = tl.minimum((p + 1) * U, N) - 1
    document = 0
    if RUNS:
        document = tl.load(RUN + b * T + last * C)
    for back in range(0, last + 1 - p * U):
        n = last - back
        if RUNS:
            now = tl.load(RUN + b * T + n * C)
            r = r * (now == document).to(ACC)
            document = now
        filled = tl.load(LOGN + (bk * N + n) * S + s, mask=ok, other=float("-inf")) > float("-inf")
        for g in range(0, G):
            h = hk * G + g
            for i0 in range(n * C, tl.minimum(n * C + C, T), BM):
                i = i0 + tl.arange(0, BM)
                i_ok = i < tl.minimum(n * C + C, T)
                q = load_rows(QFar, b, h, i0, i_ok, K, BK)
                lse = tl.load(LSE + (b * H + h) * T + i, mask=i_ok, other=float("inf"))
                x = tl.dot(c, tl.trans(q), input_precision=PREC, out_dtype=ACC) * (SCALE * LOG2E)
                w = tl.where(filled[:, None], tl.exp2(x - lse[None, :]), 0.0)  # an empty code's may overflow
                if RUNS:
                    w = tl.where((tl.load(RUN + b * T + i, mask=i_ok, other=-2) == document)[None, :], w, 0.0)
                do = load_rows(DO, b, h, i0, i_ok, VD, BV)
                r = tl.dot(w.to(do.dtype), do, r, input_precision=PREC, out_dtype=ACC)
        entered = tl.load(ADDN + (bk * N + n - 1) * S + s, mask=ok & (n > 0), other=0.0) > 0
        store_table(R, (bk * N + n) * S, s, ok & entered, r, VD, BV)
    store_table(OUT, (bk * tl.num_programs(1) + p) * S, s, ok, r, VD, BV)


@triton.jit(do_not_specialize=["T", "N", "groups"])
def chain_kernel(
    OUT, CARRY, RUN, T, S, N, groups,
    HK: tl.constexpr, VD: tl.constexpr, C: tl.constexpr, U: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
    RUNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """CARRY (B, Hkv, groups, S, V): what flows into the last block of each group. Grid (tiles of S, B·Hkv)."""
    u, bk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    s = u * BS + tl.arange(0, BS)
    ok = s < S
    carry = tl.zeros([BS, BV], ACC)
    for back in range(0, groups):
        p = groups - 1 - back
        store_table(CARRY, (bk * groups + p) * S, s, ok, carry, VD, BV)
        if RUNS:  # it goes on through the whole group, or it ends in it
            row = RUN + bk // HK * T
            last = tl.minimum((p + 1) * U, N) - 1
            after = tl.minimum((p + 1) * U, N - 1)
            carry = carry * ((tl.load(row + p * U * C) == tl.load(row + last * C)).to(ACC))
            carry = carry * ((tl.load(row + last * C) == tl.load(row + after * C)).to(ACC))
        carry += load_table(OUT, (bk * groups + p) * S, s, ok, VD, BV)
