"""Arithmetic of the lookup-free quantizers: finite scalars (fsq, ifsq) and signs (lfq, bsq).

A code is a tuple of d digits; digit i has levels[i] values, and the code's index counts with the first digit fastest:
    z = Σ_i digit_i · Π_{j<i} levels_j
Values are what the digits stand for: fsq (digit − L//2)/(L//2), i.e. [−1, 1] for odd L and [−1, 1−2/L] for even L;
lfq ±1; bsq ±1/√d.

Axes:  … any leading axes  d rounded dimensions  S = Π levels codes
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from transformer_vq.ops.constants import constants

MARGIN = 1e-3  # the paper's eps: the outermost levels lie a little inside the bound


def bound(z: Tensor, levels: Sequence[int], squash: str = "tanh") -> Tensor:
    """z (..., d) to the open interval in which rounding gives exactly L values  [Mentzer 2309.15505].

    tanh(z + shift) · half − offset with half = (L−1)(1−1e-3)/2, offset ½ for even L (else 0), shift = tan(offset/half),
    so that z = 0 maps near 0. squash "sigmoid" is ifsq: 2σ(1.6 x) − 1 for tanh(x)  [2601.17124].

    vector-quantize-pytorch 1.32.0 has half = (L−1)(1+1e-3)/2 and shift = atanh(offset/half): it reaches the same levels
    at slightly other z (for normal z one code in a hundred differs), maps z = 0 exactly to 0, and refuses L = 2. Ours
    is the paper's form, on which its numbers were made.
    """
    L = constants(levels, z.dtype, z.device)
    half = (L - 1) * (1 - MARGIN) / 2
    offset = torch.where(L % 2 == 0, 0.5, 0.0).to(z.dtype)
    x = z + (offset / half).tan()
    squashed = x.tanh() if squash == "tanh" else 2 * torch.sigmoid(1.6 * x) - 1
    return squashed * half - offset


def half_widths(like: Tensor, levels: Sequence[int]) -> Tensor:
    """L//2 of each dimension, (d), in the type and on the device of `like`: values are rounded numbers over it."""
    return constants([n // 2 for n in levels], like.dtype, like.device)


def bounded_to_digits(bounded: Tensor, levels: Sequence[int]) -> Tensor:
    """Numbers (..., d) of `bound` to the nearest digits 0 … L−1, int64; NaN to the middle one: a code must exist."""
    return (bounded.nan_to_num(nan=0.0).round() + half_widths(bounded, levels)).long()


def digits_to_values(digits: Tensor, levels: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Digits (..., d) to what they stand for, (digit − L//2)/(L//2)."""
    half = half_widths(torch.empty((), dtype=dtype, device=digits.device), levels)
    return (digits.to(dtype) - half) / half


def digits_to_codes(digits: Tensor, levels: Sequence[int]) -> Tensor:
    """Digits (..., d) int64 to code indices (...)."""
    return (digits * constants(place_values(levels), torch.int64, digits.device)).sum(-1)


def codes_to_digits(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """Code indices (...) to digits (..., d) int64."""
    places = constants(place_values(levels), torch.int64, codes.device)
    return (codes[..., None] // places) % constants(levels, torch.int64, codes.device)


def implied_values(levels: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Every code's values in the order of their indices, (S, d)."""
    return digits_to_values(codes_to_digits(torch.arange(math.prod(levels), device=device), levels), levels, dtype)


def place_values(levels: Sequence[int]) -> list[int]:
    """What one step of each digit adds to the index: 1, L_0, L_0·L_1, …"""
    return [math.prod(levels[:i]) for i in range(len(levels))]
