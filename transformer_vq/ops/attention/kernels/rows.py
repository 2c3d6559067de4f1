"""Loads and stores of rows (…, D) of a tensor with batch, head and time axes, the last axis dense."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


class Rows(NamedTuple):
    """A tensor (B, H, T, D) as kernels take it: where it starts, and its strides in entries."""

    at: Any
    b: Any
    h: Any
    t: Any


def rows(x: Tensor) -> Rows:
    """x (B, H, T, D), copied only where its last axis is not dense."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return Rows(x, *x.stride()[:3])


@triton.jit
def load_rows(X, b, h, first, index, ok, D: tl.constexpr, BD: tl.constexpr):
    """(len(index), BD) rows first+index of head h of batch row b; zeros where not ok and past D.

    b and h are int64: one 64-bit base and 32-bit offsets need fewer registers than 64-bit offsets.
    """
    d = tl.arange(0, BD)
    base = X.at + b * X.b + h * X.h + first * tl.cast(X.t, tl.int64)
    if BD == D:
        return tl.load(base + (index[:, None] * X.t + d[None, :]), mask=ok[:, None], other=0.0)
    return tl.load(base + (index[:, None] * X.t + d[None, :]), mask=ok[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def store_rows(X, b, h, first, index, ok, x, D: tl.constexpr, BD: tl.constexpr):
    """The inverse, in the type of X."""
    d = tl.arange(0, BD)
    base = X.at + b * X.b + h * X.h + first * tl.cast(X.t, tl.int64)
    mask = ok[:, None] & (d[None, :] < D)
    tl.store(base + (index[:, None] * X.t + d[None, :]), x.to(X.at.dtype.element_ty), mask=mask)


@triton.jit
def load_table(at, first, index, ok, D: tl.constexpr, BD: tl.constexpr):
    """(len(index), BD) rows first+index of a contiguous array (·, D); `first` is int64."""
    d = tl.arange(0, BD)
    mask = ok[:, None] & (d[None, :] < D)
    return tl.load(at + first * D + (index[:, None] * D + d[None, :]), mask=mask, other=0.0)


@triton.jit
def store_table(at, first, index, ok, x, D: tl.constexpr, BD: tl.constexpr):
    """The inverse, in the type of the array."""
    d = tl.arange(0, BD)
    mask = ok[:, None] & (d[None, :] < D)
    tl.store(at + first * D + (index[:, None] * D + d[None, :]), x.to(at.dtype.element_ty), mask=mask)
