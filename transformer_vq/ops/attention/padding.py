"""Real tokens first: rows with padding become rows that end early, and back.

Axes:  B batch  H heads  T length  D width
"""

from __future__ import annotations

import torch
from torch import Tensor


def real_first(mask: Tensor) -> Tensor:
    """(B, T) bool -> (B, T) int64: order that moves real tokens to the front and keeps them in order."""
    return torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)


def real(length: Tensor, T: int) -> Tensor:
    """(B,) -> (B, T) bool: the first `length` tokens."""
    return torch.arange(T, device=length.device) < length[:, None]


def pick(x: Tensor, order: Tensor) -> Tensor:
    """x (B or 1, H, T, D) with its tokens in `order` (B, N) -> (B, H, N, D)."""
    return torch.take_along_dim(x, order[:, None, :, None], dim=2)
