"""Arithmetic that must not lose digits: types, dot products, unit vectors and ratios of lengths for rows of any size.

Axes:  … any leading axes  K key width. "Row" is one vector of K numbers; every function treats each row by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
    """Matrix products inside keep every digit of their inputs: neither autocast nor TF32 nor bf16 passes of fp32."""
    precision = torch.get_float32_matmul_precision()
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of rows, (..., K), (..., K) -> (..., 1). An einsum: a product and a sum would write (..., K)."""
    return torch.einsum("...k,...k->...", a, b).unsqueeze(-1)


def largest_entry(x: Tensor) -> Tensor:
    """max |x| of each row, (..., K) -> (..., 1); NaN where the row holds one."""
    low, high = x.aminmax(dim=-1, keepdim=True)
    return torch.maximum(high, -low)


def unit(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Direction and length of each row, in a form that neither overflows nor underflows.

    (..., K) -> (direction (..., K), size (..., 1), length (..., 1)) with row = size · length · direction, ‖direction‖ = 1
    and 1 ≤ length ≤ √K: the row is divided by its largest entry, `size`, before squaring. A zero row has
    direction, size and length 0; a row with inf or NaN has NaN somewhere in its direction.
    """
    size = largest_entry(x)
    scaled = x / torch.where(size > 0, size, 1.0)
    length = scaled.norm(dim=-1, keepdim=True)
    return scaled / torch.where(length > 0, length, 1.0), size, length


def multiply_within(factor: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """factor · x in `dtype`, with the factor of a row lowered where the product would not be finite there.

    factor (..., 1) >= 0, x (..., K) wide and finite -> (..., K).
    """
    room = (
        torch.finfo(dtype).max
        * (1 - torch.finfo(x.dtype).eps * 2)
        / largest_entry(x).clamp_min(torch.finfo(x.dtype).tiny)
    )
    return (torch.minimum(factor, room) * x).to(dtype)
