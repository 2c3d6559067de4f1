"""The nearest codebook row of each key, and the row of each code.

Axes:  B batch  H heads  T length  K key width  S codes
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from transformer_vq.ops.kernels.device import usable
from transformer_vq.ops.numerics import full_precision, largest_entry, wide_dtype
from transformer_vq.ops.sums import take_rows

ALIVE = 2**22  # distances that exist at once, in a chunk of keys
FUSED = 256  # widest keys of the fused kernel, where there is a GPU


def nearest_code(k: Tensor, codebook: Tensor, metric: str = "euclidean") -> Tensor:
    """Index of the codebook row closest to each key  [van den Oord 1711.00937].

    z_t = argmin_s ‖k_t − c_s‖² (euclidean) or argmax_s k_t·c_s/‖c_s‖ (cosine).
    k (B, H, T, K), codebook (H, S, K) -> (B, H, T) int64.  Distances are fp32 or wider: bf16 would pick other codes.
    Keys are taken in chunks, whose distances are forgotten: a (T, S) matrix never exists.
    Raises ValueError when heads or widths differ, or for another metric.
    """
    _, H, _, K = k.shape
    if codebook.dim() != 3 or codebook.shape[::2] != (H, K):
        raise ValueError(f"codebook has shape {tuple(codebook.shape)}; keys {tuple(k.shape)} need ({H}, S, {K})")
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f"metric {metric!r}: must be euclidean or cosine")
    codes: Tensor = _nearest_code(k.detach(), codebook.detach(), metric)
    return codes


@torch.library.custom_op("transformer_vq::nearest_code", mutates_args=())
def _nearest_code(k: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """Opaque to the compiler, which would unroll the loops and could not hold the precision."""
    return (fused if fusible(k, codebook) and usable(k.device) else chunked)(k, codebook, metric)


def fusible(k: Tensor, codebook: Tensor) -> bool:
    """Whether the fused kernel knows such keys, where it runs."""
    return wide_dtype(k, codebook) == torch.float32 and k.shape[-1] <= FUSED


def chunked(k: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """The op's own work without the fused kernel, by heads and chunks of keys."""
    B, H, T, _ = k.shape
    wide = wide_dtype(k, codebook)
    codes = torch.empty(B, H, T, dtype=torch.int64, device=k.device)
    chunk, batch = keys_at_once(codebook.shape[1], T)
    with full_precision(k.device):
        for h in range(H):
            rows, offset, scale = _comparable_rows(codebook[h].to(wide), metric)
            for b, t in itertools.product(range(0, B, batch), range(0, T, chunk)):
                part = (slice(b, b + batch), h, slice(t, t + chunk))
                keys = _comparable(k[part].to(wide), scale).flatten(0, 1)
                nearest = torch.addmm(offset, keys, rows.T, alpha=-2).argmin(-1)  # ‖k‖² is common to all s
                codes[part] = nearest.view_as(codes[part])
    return codes


def keys_at_once(S: int, T: int) -> tuple[int, int]:
    """A chunk: so many keys of a row, of so many rows of the batch."""
    chunk = max(1, ALIVE // S)
    return chunk, max(1, chunk // max(1, T))


@_nearest_code.register_fake
def _(k: Tensor, codebook: Tensor, metric: str) -> Tensor:
    return k.new_empty(k.shape[:3], dtype=torch.int64)


def fused(k: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """The op's own work in one kernel, whose products lose no more than fp32 ones do."""
    from transformer_vq.ops.kernels.nearest import nearest  # imports triton

    tables = [_comparable_rows(rows, metric) for rows in codebook.float()]
    return nearest(k, *(torch.stack(parts) for parts in zip(*tables, strict=True)))


def lookup(codebook: Tensor, codes: Tensor) -> Tensor:
    """k̂_t = c_{z_t}, bit for bit: codebook (H, S, K), codes (B, H, T) -> (B, H, T, K) in the codebook's dtype."""
    H, S, K = codebook.shape
    first = torch.arange(H, device=codes.device)[:, None] * S
    return take_rows(codebook.reshape(H * S, K), codes + first)


def distance_tables(codebook: Tensor, metric: str = "euclidean") -> tuple[Tensor, Tensor]:
    """What the distances of many small lookups have in common: codebook (H, S, K) -> (H, 1, S) and (H, K, S).

    Keys (H, N, K) times the second, plus the first, are least at the code that `nearest_code` finds.
    """
    found = [_comparable_rows(rows, metric) for rows in codebook]
    offset = torch.stack([offset for _, offset, _ in found])
    rows = torch.stack([rows / scale.clamp_min(2.0**-50) for rows, _, scale in found])  # no overflow for tiny codes
    return offset[:, None], -2 * rows.mT


def _comparable_rows(codebook: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of (S, K) as keys meet them, what is added to −2 k·c (S,), and the power of two that rows are divided by."""
    rows, scale = _scaled(codebook)
    if metric == "cosine":
        rows = F.normalize(rows, dim=-1, eps=torch.finfo(rows.dtype).tiny)
    return rows, rows.square().sum(-1) if metric == "euclidean" else rows.new_zeros(rows.shape[0]), scale


def _scaled(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """(S, K) divided by a power of two near its largest entry, so that squares keep their digits; and the power."""
    bound = math.frexp(torch.finfo(codebook.dtype).max)[1] - 2
    exponent = torch.frexp(codebook.abs().amax()).exponent.clamp(-bound, bound)
    scale = torch.exp2(exponent.to(codebook.dtype))
    return codebook / scale, scale


def _comparable(k: Tensor, scale: Tensor) -> Tensor:
    """Keys (N, K) in the codebook's scale. One much longer than every code is shortened: only its direction matters."""
    longest = largest_entry(k) * torch.finfo(k.dtype).eps ** 2
    return k / torch.maximum(longest, scale)
