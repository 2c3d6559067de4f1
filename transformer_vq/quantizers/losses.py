"""Distances between keys and codes as training losses.

Axes:  B batch  H heads  T length  K key width  S codes
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transformer_vq.ops.numerics import wide_dtype


class _SquaredDistance(torch.autograd.Function):
    """‖a − b‖² by rows. Saves its two arguments, which are alive anyway, and not their difference."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        difference = a.to(wide_dtype(a, b)) - b
        return torch.einsum("...k,...k->...", difference, difference)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        slope = (a.to(wide_dtype(a, b)) - b).mul_(2 * grads[0][..., None])
        to_a, to_b = ctx.needs_input_grad
        return slope.to(a.dtype) if to_a else None, slope.neg().to(b.dtype) if to_b else None


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """‖a_t − b_t‖², (..., K), (..., K) -> (...), fp32 or wider, also under autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return _SquaredDistance.apply(a, b)


def mean_over_real(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of x (B, T) over real tokens; 0 when there is none."""
    if mask is None:
        return x.mean() if x.numel() else x.sum()
    return (x * mask).sum() / mask.sum().clamp_min(1)


def commitment(distance: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over batch and real time of the squared distance *summed* over heads and width  [Lingle 2309.16354].

    distance (B, H, T) of `squared_distance`.  Most VQ-VAE code, vector-quantize-pytorch too, averages over the width:
    a number smaller by a factor of K, for which their β of 0.25 to 1 is meant.
    """
    return mean_over_real(distance.sum(1), mask)
