"""Estimators for images alone: in training their value is not a row of the codebook, which attention cannot use.

They carry the gradient of the reconstruction loss to the codebook as well; their papers use no codebook and no
commitment loss beside them (`codebook_weight: 0`, `commit: 0`). In evaluation the value is the nearest row, as for all.

Axes:  … any leading axes  K key width  H heads  S codes.  k, q (..., K) -> k̂ (..., K).
"""

from __future__ import annotations

import torch
from torch import Tensor

from transformer_vq.ops.nearest import lookup, nearest_code

VARIANCE = 1e-3  # of the noise in DiVeQ's direction, its paper's value


def nsvq(k: Tensor, q: Tensor) -> Tensor:
    """k + ‖q−k‖ w/‖w‖, w normal: the error replaced by noise of its length  [Vali & Bäckström 2022, NSVQ]."""
    return k + _length(q - k) * _direction(torch.randn_like(k))


def diveq_noise(k: Tensor, q: Tensor) -> Tensor:
    """k + ‖q−k‖ sg(v/‖v‖), v = (q−k) + normal noise of variance 1e-3: DiVeQ as published  [Vali 2509.26469]."""
    return k + _length(q - k) * _noisy_direction(q - k)


def sf_diveq(k: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """A point between neighbouring codes, c_i + λ(c_{i+1} − c_i), λ drawn once per segment  [SF-DiVeQ, 2509.26469].

    k (B, H, T, K), codebook (H, S, K), S > 1 -> k̂ and the segments (B, H, T) that were nearest:
    k̂ = k + (1−λ) ‖c_i−k‖ sg(d_i) + λ ‖c_{i+1}−k‖ sg(d_{i+1}), d the noisy unit directions of DiVeQ.
    The published inference hands the decoder a point on the segment, which a code alone does not tell: not done here.
    """
    share = torch.rand(codebook.shape[0], codebook.shape[1] - 1, 1, dtype=k.dtype, device=k.device)
    rows = codebook.to(k.dtype)
    segments = nearest_code(k, torch.lerp(rows[:, :-1], rows[:, 1:], share).detach())
    right = lookup(share, segments)
    first, second = lookup(rows, segments) - k, lookup(rows, segments + 1) - k
    to_first = (1 - right) * _length(first) * _noisy_direction(first)
    return k + to_first + right * _length(second) * _noisy_direction(second), segments


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _direction(x: Tensor) -> Tensor:
    return (x / _length(x).clamp_min(1e-12)).detach()


def _noisy_direction(error: Tensor) -> Tensor:
    return _direction(error + VARIANCE**0.5 * torch.randn_like(error))


VALUES = {"nsvq": nsvq, "diveq_noise": diveq_noise}
