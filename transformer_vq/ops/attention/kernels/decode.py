"""One token in two kernels: many programs read codes and ring, one a key head brings their parts together.

The ring holds the last M keys and values; the key of place p lies in slot p mod M. When a token comes, the key that
leaves the window lies in the slot that the new one takes: it is folded into the count and the mean of its code,
n' = n + 1, m' = m·n/n' + v/n', and nothing else moves. Counts and means are fp32 or wider: in 16 bits a mean stops
moving after some thousand keys.
"""

import triton
import triton.language as tl

from transformer_vq.ops.attention.kernels.forward import take_in
from transformer_vq.ops.kernels.rows import LOG2E, load_table


@triton.jit
def load_turned(at, TURN, ok, K: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr):
    """Contiguous rows 0, 1, … of K numbers, pairs (x_c, x_{c+K/2}) turned by angles whose cos and sin TURN holds."""
    d, HALF = tl.arange(0, BK), K // 2
    other = tl.where(d < HALF, d + HALF, d - HALF)
    row = tl.arange(0, ok.shape[0])[:, None] * K
    mask = ok[:, None] & (d[None, :] < K)
    x = tl.load(at + (row + d[None, :]), mask=mask, other=0.0).to(ACC)
    y = tl.load(at + (row + other[None, :]), mask=mask, other=0.0).to(ACC)
    cos = tl.load(TURN + d % HALF, mask=d < K, other=0.0).to(ACC)
    sin = tl.load(TURN + HALF + d % HALF, mask=d < K, other=0.0).to(ACC)
    return x * cos[None, :] + y * tl.where(d < HALF, -sin, sin)[None, :]


@triton.jit(do_not_specialize=["bias_b"])
def read_kernel(
    Q, CODEBOOK, COUNT, MEAN, KEYS, V, ALIVE, BIAS, bias_b, TURN, FAR, PLACE, TOP, NORM, PART, S, M,
    HK: tl.constexpr, G: tl.constexpr, K: tl.constexpr, VD: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr, SCALE: tl.constexpr, ROTARY: tl.constexpr,
    BIASED: tl.constexpr, CACHE: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (B·Hkv, PARTS) -> TOP, NORM (B·Hkv, PARTS, G) and PART (B·Hkv, PARTS, G, V): a softmax over each part alone.

    Q (B·Hkv, G, K); CODEBOOK (Hkv, S, K); COUNT (B·Hkv, S); MEAN (B·Hkv, S, V); KEYS (B·Hkv, M, K), turned by their
    places; V (B·Hkv, M, V); ALIVE (B, M); BIAS (B or 1, Hkv, G, M+1), the farthest first; TURN, FAR (2, K/2): cos and
    sin at the token's place and at distance M; PLACE (B·Hkv).
    """
    bk, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, hk = bk // HK, bk % HK
    g = tl.arange(0, BG)
    g_ok = g < G
    if ROTARY:
        q = load_turned(Q + bk * G * K, TURN, g_ok, K, BK, ACC).to(KEYS.dtype.element_ty)
        q_far = load_turned(Q + bk * G * K, FAR, g_ok, K, BK, ACC).to(KEYS.dtype.element_ty)
    else:
        q = load_table(Q, bk * G, g, g_ok, K, BK)
        q_far = q
    acc = tl.zeros([BG, BV], ACC)
    norm = tl.zeros([BG], ACC)
    top = tl.full([BG], float("-inf"), ACC)
    codes = (S + BN - 1) // BN if CACHE else 0
    each = (codes + (M + BN - 1) // BN + PARTS - 1) // PARTS
    begin = part * each
    if CACHE:
        for tile in range(begin, tl.minimum(begin + each, codes)):
            s = tile * BN + tl.arange(0, BN)
            s_ok = s < S
            c = load_table(CODEBOOK, hk * S, s, s_ok, K, BK)
            log_count = tl.log2(tl.load(COUNT + bk * S + s, mask=s_ok, other=0.0).to(ACC))
            x = tl.dot(q_far, tl.trans(c), input_precision=PREC, out_dtype=ACC) * (SCALE * LOG2E) + log_count[None, :]
            acc, norm, top = take_in(acc, norm, top, x, load_table(MEAN, bk * S, s, s_ok, VD, BV), PREC, ACC)
    at = (tl.load(PLACE + bk) % tl.maximum(M, 1)).to(tl.int32)
    for tile in range(tl.maximum(begin - codes, 0), begin + each - codes):
        s = tile * BN + tl.arange(0, BN)
        s_ok = s < M
        k = load_table(KEYS, bk * M, s, s_ok, K, BK)
        x = tl.dot(q, tl.trans(k), input_precision=PREC, out_dtype=ACC) * SCALE
        if BIASED:
            distance = (at + M - 1 - s) % M + 1
            where = BIAS + b * bias_b + hk * G * (M + 1) + g[:, None] * (M + 1) + (M - distance)[None, :]
            x += tl.load(where, mask=g_ok[:, None] & s_ok[None, :], other=0.0).to(ACC)
        seen = tl.load(ALIVE + b * M + s, mask=s_ok, other=0) != 0
        x = tl.where(seen[None, :], x * LOG2E, float("-inf"))
        acc, norm, top = take_in(acc, norm, top, x, load_table(V, bk * M, s, s_ok, VD, BV), PREC, ACC)
    row = (bk * PARTS + part) * G
    tl.store(TOP + row + g, top, mask=g_ok)
    tl.store(NORM + row + g, norm, mask=g_ok)
    d = tl.arange(0, BV)
    mask = g_ok[:, None] & (d[None, :] < VD)
    tl.store(PART + row * VD + (g[:, None] * VD + d[None, :]), acc, mask=mask)


@triton.jit(do_not_specialize=["bias_b"])
def write_kernel(
    Q, NewKey, NewV, NEWCODE, COUNT, MEAN, KEYS, RAW, V, CODES, ALIVE, BIAS, bias_b, TURN, PLACE, TOP, NORM, PART, Out,
    S, M,
    HK: tl.constexpr, G: tl.constexpr, K: tl.constexpr, VD: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PARTS: tl.constexpr, SCALE: tl.constexpr, ROTARY: tl.constexpr, BIASED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Grid (B·Hkv) -> Out (B·Hkv, G, V); then the token takes its slot, and the key that lay there joins its mean.

    NewKey (B·Hkv, K), NewV (B·Hkv, V), NEWCODE (B·Hkv); RAW (B·Hkv, M, K): keys as they came; the rest as above.
    ALIVE is the caller's to change: all key heads of a row read it.
    """
    bk = tl.program_id(0).to(tl.int64)
    b, hk = bk // HK, bk % HK
    g, d, e = tl.arange(0, BG), tl.arange(0, BV), tl.arange(0, BK)
    g_ok, d_ok, e_ok = g < G, d < VD, e < K
    acc = tl.zeros([BG, BV], ACC)
    norm = tl.zeros([BG], ACC)
    top = tl.full([BG], float("-inf"), ACC)
    for part in range(PARTS):
        row = (bk * PARTS + part) * G
        highest = tl.load(TOP + row + g, mask=g_ok, other=float("-inf"))
        more = tl.load(NORM + row + g, mask=g_ok, other=0.0)
        mask = g_ok[:, None] & d_ok[None, :]
        x = tl.load(PART + row * VD + (g[:, None] * VD + d[None, :]), mask=mask, other=0.0)
        both = tl.maximum(top, highest)
        pivot = tl.where(both == float("-inf"), 0.0, both)
        shrink, share = tl.exp2(top - pivot), tl.exp2(highest - pivot)
        acc, norm, top = acc * shrink[:, None] + x * share[:, None], norm * shrink + more * share, both
    k = tl.load(NewKey + bk * K + e, mask=e_ok, other=0.0)
    v = tl.load(NewV + bk * VD + d, mask=d_ok, other=0.0)
    code = tl.load(NEWCODE + bk)
    q = load_table(Q, bk * G, g, g_ok, K, BK).to(ACC)
    x = tl.sum(q * k.to(ACC)[None, :], 1) * SCALE  # at distance 0 a rotation does not show
    if BIASED:
        x += tl.load(BIAS + b * bias_b + (hk * G + g) * (M + 1) + M, mask=g_ok, other=0.0).to(ACC)
    both = tl.maximum(top, x * LOG2E)
    shrink, share = tl.exp2(top - both), tl.exp2(x * LOG2E - both)
    acc, norm = acc * shrink[:, None] + v.to(ACC)[None, :] * share[:, None], norm * shrink + share
    out = (acc / norm[:, None]).to(Out.dtype.element_ty)
    tl.store(Out + bk * G * VD + (g[:, None] * VD + d[None, :]), out, mask=g_ok[:, None] & d_ok[None, :])

    place = tl.load(PLACE + bk)
    slot, leaving, alive, old = place * 0, code, 1, v
    if M > 0:
        slot = place % M
        leaving = tl.load(CODES + bk * M + slot)
        alive = tl.load(ALIVE + b * M + slot).to(tl.int32)
        old = tl.load(V + (bk * M + slot) * VD + d, mask=d_ok, other=0.0)
    row = bk * S + leaving
    count = tl.load(COUNT + row)
    mean = tl.load(MEAN + row * VD + d, mask=d_ok, other=0.0)
    tl.debug_barrier()  # no thread writes before all have read
    if alive != 0:
        mean = mean * (count / (count + 1)) + old.to(ACC) / (count + 1)
        tl.store(MEAN + row * VD + d, mean, mask=d_ok)
        tl.store(COUNT + row, count + 1)
    if M > 0:
        tl.store(CODES + bk * M + slot, code)
        tl.store(V + (bk * M + slot) * VD + d, v, mask=d_ok)
        tl.store(RAW + (bk * M + slot) * K + e, k, mask=e_ok)
        if ROTARY:
            turned = load_turned(NewKey + bk * K, TURN, tl.zeros([1], tl.int32) == 0, K, BK, ACC)
            turned = tl.sum(turned, 0)
            tl.store(KEYS + (bk * M + slot) * K + e, turned.to(KEYS.dtype.element_ty), mask=e_ok)
    tl.store(PLACE + bk, place + 1)
