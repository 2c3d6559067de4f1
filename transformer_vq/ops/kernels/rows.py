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
def load_rows(X, b, h, start, ok, D: tl.constexpr, BD: tl.constexpr):
    """(len(ok), BD) rows start, start+1, … of head h of batch row b; zeros where not ok and past D.

    b and h are int64, and so is what leads to the first row: a tensor may have more than 2³¹ entries. From there on 32
    bits reach far enough, and need fewer registers.
    """
    d, t = tl.arange(0, BD), tl.arange(0, ok.shape[0])
    base = X.at + b * X.b + h * X.h + tl.cast(start, tl.int64) * X.t
    if BD == D:
        return tl.load(base + (t[:, None] * X.t + d[None, :]), mask=ok[:, None], other=0.0)
    return tl.load(base + (t[:, None] * X.t + d[None, :]), mask=ok[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def store_rows(X, b, h, start, ok, x, D: tl.constexpr, BD: tl.constexpr):
    """The inverse, in the type of X."""
    d, t = tl.arange(0, BD), tl.arange(0, ok.shape[0])
    base = X.at + b * X.b + h * X.h + tl.cast(start, tl.int64) * X.t
    mask = ok[:, None] & (d[None, :] < D)
    tl.store(base + (t[:, None] * X.t + d[None, :]), x.to(X.at.dtype.element_ty), mask=mask)


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
