"""Arithmetic of the sign quantizers: a code is d signs, and positive ones are the binary digits of its index.

Axes:  … any leading axes  d binary dimensions  S = 2^d codes
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def signs(z: Tensor) -> Tensor:
    """±1, (..., d); zero counts as positive."""
    return torch.where(z >= 0, 1.0, -1.0).to(z.dtype)


def sign_entropies(z: Tensor, size: float, temperature: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """E[H(code)] and H(E[code]) in nats, of a softmax over −‖z − c‖²/temperature with the codes c = ±size.

    z (B, H, T, d), mask (B, T) -> two scalars, means over heads. Such a softmax is a product of one sigmoid per
    dimension, so the first is exact. The second treats the dimensions of the mean as independent, as BSQ does
    [Zhao 2406.07548]: an upper bound, at a cost of d and not of 2^d per key.
    vector-quantize-pytorch 1.32.0 sums over all 2^d codes instead.
    """
    logit = 4 * size / temperature * z
    p = torch.sigmoid(logit)
    size_of_logit = logit.abs()  # entropy by the logit: where the sigmoid is 0 or 1, its logarithm has no slope
    each = (F.softplus(-size_of_logit) + size_of_logit * torch.sigmoid(-size_of_logit)).sum(-1)
    if mask is None:
        mean, expected = p.mean((0, 2)), each.mean()
    else:
        n = mask.sum().clamp_min(1)
        mean = (p * mask[:, None, :, None]).sum((0, 2)) / n
        expected = (each * mask[:, None]).sum((0, 2)).mean() / n
    eps = torch.finfo(p.dtype).eps
    mean = mean.clamp(eps, 1 - eps)
    return expected, (torch.special.entr(mean) + torch.special.entr(1 - mean)).sum(-1).mean()
