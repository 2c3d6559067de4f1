"""Estimators whose G is built from one key and its code: the identity, rotations, and their controls.

k̄, q̄ are the unit vectors of k, q. A rotation that takes k̄ to q̄ and leaves alone what is orthogonal to both is a
product of two reflections, R = (I − 2 q̄ q̄ᵀ)(I − 2 r rᵀ) with r = (k̄+q̄)/‖k̄+q̄‖; multiplied out it is the
I − 2 r rᵀ + 2 q̄ k̄ᵀ of Fifty 2410.06424. As a product it stays orthogonal to rounding even where r loses digits,
beside antipodal rows.

Rows for which no such map exists (a zero or non-finite vector; exactly antipodal ones where r is needed) get G = I;
no other row does. Rows are rescaled by their largest entry before anything is squared. ‖q‖/‖k‖ is lowered where
Gᵀg would not be finite in the keys' dtype.

Axes:  … any leading axes  K key width.  k, q (..., K) -> k̂ (..., K), forward is q.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transformer_vq.ops.estimators.through import through
from transformer_vq.ops.numerics import dot, multiply_within, unit


def ste(k: Tensor, q: Tensor) -> Tensor:
    """G = I  [van den Oord 1711.00937]."""
    return through(k, q, _identity)


def rotation(k: Tensor, q: Tensor) -> Tensor:
    """G = (‖q‖/‖k‖) R: the map that really takes k to q, a rotation and a ratio of lengths  [Fifty 2410.06424, table 1]."""
    return through(k, q, _rotation)


def _identity(k: Tensor, q: Tensor, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, None]:
    return g, None


def _rotation(k: Tensor, q: Tensor, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, None]:
    k_unit, k_size, k_length = unit(k)
    q_unit, q_size, q_length = unit(q)
    r, apart = _bisector(k_unit, q_unit)
    ok = _usable(k_unit, q_unit) & apart
    rotated = _reflect(_reflect(g, q_unit), r)
    return torch.where(
        ok, multiply_within((q_size / k_size) * (q_length / k_length), rotated, dtype), g.to(dtype)
    ), None


def _usable(k_unit: Tensor, q_unit: Tensor) -> Tensor:
    """Rows (..., 1) in which both vectors are finite and not zero."""
    return (dot(k_unit, k_unit) > 0.5) & (dot(q_unit, q_unit) > 0.5)


def _bisector(k_unit: Tensor, q_unit: Tensor) -> tuple[Tensor, Tensor]:
    """r = (k̄+q̄)/‖k̄+q̄‖ (..., K), and whether it exists (..., 1): a sum of rounding errors is no direction."""
    both = k_unit + q_unit
    length = both.norm(dim=-1, keepdim=True)
    exists = length > 4 * torch.finfo(both.dtype).eps
    return both / torch.where(exists, length, 1.0), exists


def _reflect(g: Tensor, axis: Tensor) -> Tensor:
    """(I − 2 a aᵀ) g for unit rows a."""
    return g - 2 * dot(axis, g) * axis
