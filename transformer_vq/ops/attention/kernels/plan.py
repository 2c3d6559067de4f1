"""What the kernels are told about a call, beside what gets gradient. Imports no triton.

Axes:  B batch  Hkv key heads  T length  K, V widths  S codes  M window  L block  C tokens between renewals of the cache
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from transformer_vq.ops.attention.kernels.tiles import Tiles


class Past(NamedTuple):
    """M keys at positions −M … −1: in the window as they were made, beyond it rows of the present codebook."""

    k: Tensor
    """(B, Hkv, M, K)."""
    k_far: Tensor
    v: Tensor
    codes: Tensor
    """(B, Hkv, M)."""
    run: Tensor
    """(B, M) int32: 0, or −1 for an empty slot."""


@dataclass(frozen=True)
class Plan:
    """Everything about a call that gets no gradient."""

    codes: Tensor
    """(B, Hkv, T) int64."""
    codebook: Tensor
    """(Hkv, S, K)."""
    run: Tensor | None
    """(B, T) int32 document of each token; None: one document."""
    past: Past | None
    """Keys carried from earlier calls."""
    count: Tensor
    """(B, Hkv, S): the cache that the first block sees."""
    mean: Tensor
    """(B, Hkv, S, V)."""
    M: int
    C: int
    L: int
    scale: float
    cache: bool
    gradients: str
    through: bool
    tiles: Tiles
