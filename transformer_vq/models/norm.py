"""Root-mean-square norm with gain and bias, as in the paper's code  [Zhang 1910.07467; Lingle 2309.16354].

y = x / sqrt(ε + mean(x²)) · g + b.  No centring; ε (1e-6, or `norm_eps`) is added to the mean square, inside the root.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPSILON = 1e-6


def rms_normalize(x: Tensor, scale: float = 1.0, eps: float = EPSILON) -> Tensor:
    """scale · x / sqrt(ε + mean(x²)) over the last axis: (..., D) -> (..., D) in x's dtype, within fp32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * scale).to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_normalize` with a learned gain (`weight`, 1 at first) and bias (0): (..., width) -> (..., width)."""

    def __init__(self, width: int, eps: float = EPSILON) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """The result has x's dtype; gain and bias act before it is rounded to it."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (rms_normalize(wide, eps=self.eps) * self.weight + self.bias).to(x.dtype)
