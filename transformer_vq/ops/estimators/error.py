"""Estimators that move the key along its quantization error d = q − k, and so give the codebook a gradient too.

    k̂ = k + r·sg(d/r),  r = ‖d‖^α      ∂k̂/∂k = I − α d̂ d̂ᵀ,  ∂k̂/∂q = α d̂ d̂ᵀ,  d̂ = d/‖d‖     [Vali 2509.26469]

α = 1 is DiVeQ without its noise, α = 0 is the straight-through estimator; the family is Su Jianlin's.

The image-only ones have a forward value that is not a code, in training; after training use q.

Axes:  … any leading axes  K key width.  k, q (..., K) -> k̂ (..., K).
"""

from __future__ import annotations

import torch
from torch import Tensor

from transformer_vq.ops.estimators.noise import Source, normal, uniform_per_code
from transformer_vq.ops.estimators.through import Pulled, through
from transformer_vq.ops.nearest import lookup, nearest_code
from transformer_vq.ops.numerics import direction, dot, largest_entry

NOISE_VARIANCE = 1e-3  # of the direction's noise; small against ‖d‖², or the direction is lost


def diveq(k: Tensor, q: Tensor, alpha: float = 1.0) -> Tensor:
    """The detached form of DiVeQ: forward q, G = I − α d̂ d̂ᵀ for k and α d̂ d̂ᵀ for q; α = 0 is `ste`.

    The published DiVeQ adds noise to the direction (`diveq_noise`), and so does vector-quantize-pytorch 1.32.0
    (variance 5e-3): its forward value leaves the codebook, on which the attention's cache rests. With the noise at
    zero the gradients agree.
    A row with q = k, or one that is not finite, has G = I and gives q nothing.
    """
    return through(k, q, _diveq, alpha)


def _diveq(k: Tensor, q: Tensor, g: Tensor, alpha: float) -> Pulled:
    size = torch.maximum(largest_entry(k), largest_entry(q))
    size = torch.where(size > 0, size, 1.0)  # a difference of two huge rows would overflow
    d = direction(q / size - k / size)
    along = alpha * dot(d.unit, g) * d.unit
    return Pulled(g - along, torch.ones_like(d.length), d.ok, to_q=along)


def nsvq(k: Tensor, q: Tensor, generator: Source) -> Tensor:
    """k + ‖q−k‖·n/‖n‖, n normal: the error's length in a random direction  [Vali and Bäckström 2022]. Images only."""
    return k + _length(q - k) * _unit(normal(k, generator).to(k.dtype))


def diveq_noise(k: Tensor, q: Tensor, generator: Source) -> Tensor:
    """k + ‖q−k‖·sg(v/‖v‖), v = q − k + normal noise of variance 1e-3: DiVeQ as published  [2509.26469]. Images only."""
    error = q - k
    return k + _length(error) * _unit(error + NOISE_VARIANCE**0.5 * normal(k, generator).to(k.dtype))


def sf_diveq(k: Tensor, q: Tensor, codebook: Tensor, generator: Source) -> Tensor:
    """Space-filling DiVeQ, detached form: the nearest of S−1 random points on the segments between neighbouring codes.

    With λ_s uniform in [0, 1], one per segment and step, the point is (1−λ)c_s + λ c_{s+1}; ends move as in `diveq`:
    k̂ = k + (1−λ)‖c_s−k‖·sg(d̂_s) + λ‖c_{s+1}−k‖·sg(d̂_{s+1})  [2509.26469]. Images only; q is not used.
    k (B, H, T, K), codebook (H, S, K) with S >= 2.
    """
    S = codebook.shape[1]
    if S < 2:
        raise ValueError(f"sf_diveq: codebook {tuple(codebook.shape)} has no segment; it needs two codes")
    share = uniform_per_code(codebook[:, :-1, :1], generator).to(codebook.dtype)
    first, second = codebook[:, :-1], codebook[:, 1:]
    segment = nearest_code(k, torch.lerp(first, second, share))
    to_first, to_second = (lookup(end, segment).to(k.dtype) - k for end in (first, second))
    at = lookup(share, segment).to(k.dtype)
    return k + (1 - at) * _length(to_first) * _unit(to_first) + at * _length(to_second) * _unit(to_second)


def _length(x: Tensor) -> Tensor:
    length: Tensor = x.norm(dim=-1, keepdim=True)
    return length


def _unit(x: Tensor) -> Tensor:
    return direction(x.detach()).unit
