"""The nearest codebook row of each key, fused: distances live in registers, one running minimum a key.

Products are as good as fp32 ones without the time of those:

    bf16 keys     the codebook as a sum of three bf16 parts: three products of 16 bits
    others        three TF32 products of parts of both (`tf32x3`); fp16 keys are TF32 numbers

Axes:  B batch  H heads  T length  K key width  S codes        Oracle: ../nearest.py
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from transformer_vq.ops.kernels.device import architecture, launched, on_its_device
from transformer_vq.ops.kernels.rows import load_rows, load_table, rows

SPLIT = (torch.bfloat16,)
"""Types of keys that meet the codebook in three parts of their type."""
EPS2 = tl.constexpr(2.0**-46)
"""Keys longer than all codes by more than its inverse are shortened: only their direction matters."""


class Tile(NamedTuple):
    """Keys and codes of one product, and how it is compiled."""

    keys: int
    codes: int
    warps: int


def tile(arch: int, K: int, split: bool) -> Tile:
    """A fixed table, so that codes do not depend on a search; not every entry has been compiled."""
    if split:
        return Tile(128, 64, 8) if K <= 128 else Tile(64, 32, 8)
    if K <= 128:
        return Tile(64, 32, 8) if K <= 64 or 90 <= arch < 120 else Tile(64, 16, 8)
    return Tile(16, 32, 4)


@on_its_device
def nearest(k: Tensor, table: Tensor, offset: Tensor, scale: Tensor) -> Tensor:
    """argmin_s offset_s − 2 k_t·table_s/size_t, the lowest s of several: (B, H, T) int64.

    k (B, H, T, K), 16 or 32 bits; table (H, S, K) and offset (H, S) fp32; scale (H,) fp32, powers of two that keys are
    divided by; size_t is scale, or more for a key that is much longer.
    """
    B, H, T, K = k.shape
    split, S = k.dtype in SPLIT, table.shape[1]
    chosen = tile(architecture(k.device), K, split)
    parts = [table] if not split else thirds(table, k.dtype)
    codes = torch.empty(B, H, T, dtype=torch.int64, device=k.device)
    if codes.numel():
        launched(nearest_kernel, (triton.cdiv(T, chosen.keys), H, B))(
            rows(k), torch.stack(parts), offset.contiguous(), scale.contiguous(), codes, T, S, H,
            K=K, BK=max(16, triton.next_power_of_2(K)), BM=chosen.keys, BN=chosen.codes, SPLIT=split,
            num_warps=chosen.warps, num_stages=2,
        )  # fmt: skip
    return codes


def thirds(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Three tensors of a narrower type whose sum is x, as far as its digits go."""
    parts = []
    for _ in range(3):
        parts.append(x.to(dtype))
        x = x - parts[-1].to(x.dtype)
    return parts


@triton.jit(do_not_specialize=["T"])
def nearest_kernel(
    Keys, TABLE, OFFSET, SCALE, CODES, T, S, H,
    K: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of T, H, B) -> CODES (B, H, T) int64. TABLE (parts, H, S, K), OFFSET (H, S), SCALE (H)."""
    t, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first = t * BM
    i = first + tl.arange(0, BM)
    i_ok = i < T
    k = load_rows(Keys, b, h, first, i_ok, K, BK)
    size = tl.maximum(tl.max(tl.abs(k.to(tl.float32)), 1) * EPS2, tl.load(SCALE + h))
    bits = (size.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000  # a power of two, so that keys keep their digits
    scaled = k.to(tl.float32) * (1.0 / bits.to(tl.float32, bitcast=True))[:, None]
    if SPLIT:
        k = scaled.to(k.dtype)
    least = tl.full([BM], float("inf"), tl.float32)
    code = tl.zeros([BM], tl.int32)
    for s0 in range(0, S, BN):
        s = s0 + tl.arange(0, BN)
        s_ok = s < S
        if SPLIT:
            x = tl.dot(k, tl.trans(load_table(TABLE, (2 * H + h) * S, s, s_ok, K, BK)))
            x = tl.dot(k, tl.trans(load_table(TABLE, (H + h) * S, s, s_ok, K, BK)), x)
            x = tl.dot(k, tl.trans(load_table(TABLE, h * S, s, s_ok, K, BK)), x)
        else:
            c = load_table(TABLE, h * S, s, s_ok, K, BK)
            x = tl.dot(scaled, tl.trans(c), input_precision="tf32x3")
        x = tl.load(OFFSET + h * S + s, mask=s_ok, other=float("inf"))[None, :] - 2.0 * x
        low, at = tl.min(x, 1, return_indices=True)  # of equal ones the first
        nearer = low < least
        least, code = tl.where(nearer, low, least), tl.where(nearer, s0 + at, code)
    tl.store(CODES + (b * H + h) * T + i, code.to(tl.int64), mask=i_ok)
