"""Output and logsumexp of VQ attention: one pass over codes, one over the strip, softmax along the way."""

import triton
import triton.language as tl

from transformer_vq.ops.attention.kernels.strip import BOTH, FAR, NEAR, parts, strip_logits, tile_of_queries
from transformer_vq.ops.kernels.rows import LOG2E, load_rows, load_table, store_rows


@triton.jit
def take_in(acc, norm, top, x, v, PREC: tl.constexpr, ACC: tl.constexpr):
    """Online softmax: logits x (BM, BN) and values v (BN, BV) join what was seen before."""
    highest = tl.maximum(top, tl.max(x, 1))
    pivot = tl.where(highest == float("-inf"), 0.0, highest)  # nothing seen so far: no −inf − (−inf)
    p, shrink = tl.exp2(x - pivot[:, None]), tl.exp2(top - pivot)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PREC, out_dtype=ACC)
    return acc, norm * shrink + tl.sum(p, 1), highest


@triton.jit
def read_strip(
    acc, norm, top, q, q_far, Keys, KeysFar, V, KRUN, run_at, shift, b, hk, i, i_ok, q_run, begin, end, M,
    BIAS, bias_at, bias_t,
    K: tl.constexpr, VD: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SCALE: tl.constexpr,
    TWO: tl.constexpr, SIDE: tl.constexpr, CAUSAL: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr,
    CACHE: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Keys begin … end−1, which stand `shift` rows later in their tensors, join the softmax."""
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
        x, _ = strip_logits(
            q, q_far, k, k_far, i, j, i_ok, j_ok, M, BIAS, bias_at, bias_t, q_run, k_run,
            SCALE, TWO, SIDE, CAUSAL, BIASED, MASKED, CACHE, PREC, ACC,
        )  # fmt: skip
        v = load_rows(V, b, hk, shift + j0, j_ok, VD, BV)
        acc, norm, top = take_in(acc, norm, top, x, v, PREC, ACC)
    return acc, norm, top


@triton.jit(do_not_specialize=["T", "N"])
def forward_kernel(
    Q, QFar, Keys, KeysFar, V, PKeys, PKeysFar, PV, PRUN, RUN, CODEBOOK, LOGN, MEAN, FILLED,
    BIAS, bias_b, bias_h, bias_t, Out, LSE, T, M, S, N,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, VD: tl.constexpr, C: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SCALE: tl.constexpr, ROTARY: tl.constexpr,
    PAST: tl.constexpr, BIASED: tl.constexpr, RUNS: tl.constexpr, CACHE: tl.constexpr, SPLIT: tl.constexpr,
    PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, H, B) -> O (B, H, T, V) and LSE (B, H, T), in base 2.

    Q, QFar (B, H, T, K) and Keys, KeysFar (B, Hkv, T, K): as pairs inside and beyond the window see them; P…: the M
    carried keys. PRUN (B, M) is 0 or −1, RUN (B, T) the document. FILLED (B, Hkv, N): S, or 0 where a cache is empty.
    """
    t, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
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
    bias_at = b * bias_b + h * bias_h + tl.cast(first, tl.int64) * bias_t
    acc = tl.zeros([BM, BV], ACC)
    norm = tl.zeros([BM], ACC)
    top = tl.full([BM], float("-inf"), ACC)

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
            acc, norm, top = take_in(acc, norm, top, x, mean, PREC, ACC)

    begin = n * C - M
    if not CACHE:
        begin = first - M
    if PAST:
        acc, norm, top = read_strip(
            acc, norm, top, q, q_far, PKeys, PKeysFar, PV, PRUN, b * M, M, b, hk, i, i_ok, q_run,
            tl.maximum(begin, -M), 0, M, BIAS, bias_at, bias_t,
            K, VD, BN, BK, BV, SCALE, True, BOTH, False, BIASED, True, CACHE, PREC, ACC,
        )  # fmt: skip
    begin = tl.maximum(begin, 0)
    WINDOWED: tl.constexpr = ROTARY or BIASED or not CACHE
    if SPLIT:
        far, both, near = parts(begin, first, stop - 1, M, BN, WINDOWED)
        if WINDOWED:
            if CACHE:
                acc, norm, top = read_strip(
                    acc, norm, top, q, q_far, Keys, KeysFar, V, RUN, b * T, 0, b, hk, i, i_ok, q_run,
                    begin, far, M, BIAS, bias_at, bias_t,
                    K, VD, BN, BK, BV, SCALE, ROTARY, FAR, False, BIASED, RUNS, CACHE, PREC, ACC,
                )  # fmt: skip
            acc, norm, top = read_strip(
                acc, norm, top, q, q_far, Keys, KeysFar, V, RUN, b * T, 0, b, hk, i, i_ok, q_run,
                far, tl.minimum(both, stop), M, BIAS, bias_at, bias_t,
                K, VD, BN, BK, BV, SCALE, ROTARY, BOTH, True, BIASED, RUNS, CACHE, PREC, ACC,
            )  # fmt: skip
        acc, norm, top = read_strip(
            acc, norm, top, q, q_far, Keys, KeysFar, V, RUN, b * T, 0, b, hk, i, i_ok, q_run,
            both, near, M, BIAS, bias_at, bias_t,
            K, VD, BN, BK, BV, SCALE, ROTARY, NEAR, False, BIASED, RUNS, CACHE, PREC, ACC,
        )  # fmt: skip
        acc, norm, top = read_strip(
            acc, norm, top, q, q_far, Keys, KeysFar, V, RUN, b * T, 0, b, hk, i, i_ok, q_run,
            near, stop, M, BIAS, bias_at, bias_t,
            K, VD, BN, BK, BV, SCALE, ROTARY, NEAR, True, BIASED, RUNS, CACHE, PREC, ACC,
        )  # fmt: skip
    else:
        acc, norm, top = read_strip(
            acc, norm, top, q, q_far, Keys, KeysFar, V, RUN, b * T, 0, b, hk, i, i_ok, q_run,
            begin, stop, M, BIAS, bias_at, bias_t,
            K, VD, BN, BK, BV, SCALE, ROTARY, BOTH if WINDOWED else NEAR, True, BIASED, RUNS, CACHE, PREC, ACC,
        )  # fmt: skip
    store_rows(Out, b, h, first, i_ok, acc / norm[:, None], VD, BV)
    tl.store(LSE + (b * H + h) * T + i, top + tl.log2(norm), mask=i_ok)
