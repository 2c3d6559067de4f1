"""The cache at each block: log2 of the count and the mean value of every code, for keys older than the block's strip.

Two steps: `sums` adds up by code what leaves the strip after each block, all blocks at once, as a product with 0/1
entries; `scan` runs over the blocks. What belongs to another document than the next block's first token is dropped.
"""

import triton
import triton.language as tl

from transformer_vq.ops.kernels.rows import load_rows, load_table, store_table


@triton.jit
def add_by_code(
    count, total, V, CODES, VISIBLE, b, hk, codes_at, visible_at, shift, begin, end, s, following,
    VD: tl.constexpr, BV: tl.constexpr, BJ: tl.constexpr, MASKED: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add keys begin … end−1, found `shift` places later in their arrays, to count (BS) and total (BS, BV)."""
    for j0 in range(begin, end, BJ):
        j = j0 + tl.arange(0, BJ)
        ok = j < end
        z = tl.load(CODES + codes_at + shift + j, mask=ok, other=-1).to(tl.int32)
        if MASKED:
            run = tl.load(VISIBLE + visible_at + shift + j, mask=ok, other=-3)
            z = tl.where(run == following, z, -1)
        hot = s[:, None] == z[None, :]
        v = load_rows(V, b, hk, shift + j0, ok, VD, BV)
        total = tl.dot(hot.to(v.dtype), v, total, out_dtype=ACC, input_precision=PREC)
        count += tl.sum(hot.to(ACC), 1)
    return count, total


@triton.jit(do_not_specialize=["T", "N"])
def sums_kernel(
    V, CODES, PV, PCODES, PRUN, RUN, ADDN, ADDS, T, M, S, N,
    HK: tl.constexpr, VD: tl.constexpr, C: tl.constexpr, BS: tl.constexpr, BJ: tl.constexpr, BV: tl.constexpr,
    PAST: tl.constexpr, RUNS: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Count and sum of the values that leave after block n, by code: positions nC−M … nC+C−M−1.

    Grid (N−1, tiles of S, B·Hkv). V (B, Hkv, T, V), CODES (B, Hkv, T); P…: the same of the M carried keys.
    RUN (B, T) documents, PRUN (B, M) 0 or −1 -> ADDN (B, Hkv, N, S), ADDS (B, Hkv, N, S, V).
    """
    n, u, bk = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, hk = bk // HK, bk % HK
    s = u * BS + tl.arange(0, BS)
    s = tl.where(s < S, s, -2)  # −2: no code
    count = tl.zeros([BS], ACC)
    total = tl.zeros([BS, BV], ACC)
    following = 0
    if RUNS:
        following = tl.load(RUN + b * T + (n + 1) * C)
    begin, end = n * C - M, tl.minimum(n * C + C - M, T)
    if PAST:
        count, total = add_by_code(
            count, total, PV, PCODES, PRUN, b, hk, bk * M, b * M, M, begin, tl.minimum(end, 0), s, following,
            VD, BV, BJ, True, PREC, ACC,
        )  # fmt: skip
    count, total = add_by_code(
        count, total, V, CODES, RUN, b, hk, bk * T, b * T, 0, tl.maximum(begin, 0), end, s, following,
        VD, BV, BJ, RUNS, PREC, ACC,
    )  # fmt: skip
    tl.store(ADDN + (bk * N + n) * S + s, count, mask=s >= 0)
    store_table(ADDS, (bk * N + n) * S, s, s >= 0, total, VD, BV)


@triton.jit(do_not_specialize=["T", "N"])
def scan_kernel(
    ADDN, ADDS, COUNT0, MEAN0, RUN, LOGN, MEAN, T, S, N,
    HK: tl.constexpr, VD: tl.constexpr, C: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
    RUNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Running sums: what each block sees. Grid (tiles of S, B·Hkv), serial over blocks.

    COUNT0 (B, Hkv, S), MEAN0 (B, Hkv, S, V): what the first block sees -> LOGN (B, Hkv, N, S), −inf for a count of 0,
    and MEAN (B, Hkv, N, S, V).
    """
    u, bk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    s = u * BS + tl.arange(0, BS)
    ok = s < S
    count = tl.load(COUNT0 + bk * S + s, mask=ok, other=0.0).to(ACC)
    total = load_table(MEAN0, bk * S, s, ok, VD, BV).to(ACC) * count[:, None]
    document = 0
    if RUNS:
        document = tl.load(RUN + bk // HK * T)
    for n in range(N):
        if n > 0:
            if RUNS:
                now = tl.load(RUN + bk // HK * T + n * C)
                keep = (now == document).to(ACC)
                count, total, document = count * keep, total * keep, now
            count += tl.load(ADDN + (bk * N + n - 1) * S + s, mask=ok, other=0.0)
            total += load_table(ADDS, (bk * N + n - 1) * S, s, ok, VD, BV)
        tl.store(LOGN + (bk * N + n) * S + s, tl.log2(count), mask=ok)
        store_table(MEAN, (bk * N + n) * S, s, ok, total / tl.maximum(count, 1.0)[:, None], VD, BV)
