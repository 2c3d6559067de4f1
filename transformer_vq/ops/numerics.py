"""Arithmetic that must not lose digits: types, dot products, unit vectors and ratios of lengths for rows of any size.

Axes:  … any leading axes  K key width. "Row" is one vector of K numbers; every function treats each row by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest dtype of the tensors, at least fp32; fp64 stays fp64, so that oracles keep their digits."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products inside keep every digit of their inputs: neither autocast nor TF32 nor bf16 passes of fp32.

    Code that is being compiled cannot change the setting, only autocast; what must not lose digits is a custom op.
    """
    precision = "highest" if torch.compiler.is_compiling() else torch.get_float32_matmul_precision()
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(autocast_type(device), enabled=False):
            yield
    finally:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)


def autocast_type(device: torch.device) -> str:
    """What `torch.autocast` calls it; it knows no meta tensors."""
    return "cpu" if device.type == "meta" else device.type


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of rows, (..., K), (..., K) -> (..., 1)."""
    product: Tensor = torch.linalg.vecdot(a, b).unsqueeze(-1)
    return product


def largest_entry(x: Tensor) -> Tensor:
    """max |x| of each row, (..., K) -> (..., 1); NaN where the row holds one."""
    return x.abs().amax(-1, keepdim=True)


class Direction(NamedTuple):
    """Rows as direction and length, in a form that neither overflows nor underflows: row = size · length · unit."""

    unit: Tensor
    """(..., K), of length 1; where not ok it means nothing and may be NaN."""
    size: Tensor
    """(..., 1), the largest entry: rows are divided by it before anything is squared."""
    length: Tensor
    """(..., 1), between 1 and √K where ok."""
    ok: Tensor
    """(..., 1) bool: finite and not zero."""


def direction(x: Tensor) -> Direction:
    """Direction and length of each row, (..., K)."""
    size = largest_entry(x)
    ok = (size > 0) & size.isfinite()
    scaled = x / torch.where(ok, size, 1.0)
    length = scaled.norm(dim=-1, keepdim=True)
    return Direction(scaled / torch.where(ok, length, 1.0), size, length, ok)


def length_ratio(numerator: Direction, denominator: Direction) -> Tensor:
    """‖a‖/‖b‖ of each row (..., 1), cut at the largest number of its type; 1 where a row is zero or not finite."""
    ok = numerator.ok & denominator.ok
    sizes = numerator.size / torch.where(ok, denominator.size, 1.0)
    lengths = numerator.length / torch.where(ok, denominator.length, 1.0)
    return torch.where(ok, (sizes * lengths).clamp_max(torch.finfo(sizes.dtype).max), 1.0)


def multiply_within(factor: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """factor · x in `dtype`, the factor of a row lowered where the product would not be finite there.

    factor (..., 1) >= 0, inf allowed; x (..., K) wide and finite -> (..., K).
    """
    wide = torch.finfo(x.dtype)
    largest = torch.finfo(dtype).max * (1 - 4 * wide.eps)  # room for the rounding of the product
    room = largest / largest_entry(x).clamp_min(wide.tiny)
    return (torch.minimum(factor, room.clamp_max(wide.max)) * x).to(dtype)
