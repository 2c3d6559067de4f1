"""Root-mean-square norm with gain and bias, as in the paper's code  [Zhang 1910.07467; Lingle 2309.16354].

y = x / sqrt(ε + mean(x²)) · g + b.  No centring; ε (1e-6, or `norm_eps`) is added to the mean square, inside the root.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from transformer_vq.ops.numerics import wide_dtype
from transformer_vq.ops.rms_norm import rms_norm

EPSILON = 1e-6


def rms_normalize(x: Tensor, scale: float = 1.0, eps: float = EPSILON) -> Tensor:
    """scale · x / sqrt(ε + mean(x²)) over the last axis: (..., D) -> (..., D) in x's dtype, within fp32 or wider."""
    return rms_norm(x, None, None, scale, eps)


def prepared_norm(
    width: int, scale: float | Tensor, like: Tensor, shift: Tensor | None = None, eps: float = EPSILON
) -> Callable[[Tensor], Tensor]:
    """`scale · rms_normalize(x, eps=eps) + shift`, in four short operations for what is called once a token and layer.

    Widths of `width`; scale, a number or (width,), and shift (width,) or None have the type of `like`, as x must.
    √(ε + mean x²) is the hypotenuse of ‖x‖ and √(Dε), over √D. Of 16 bits x is widened, and the result rounded.
    """
    dtype, wide = like.dtype, wide_dtype(like)
    like = like.to(wide)
    floor = torch.full_like(like[:1], (width * eps) ** 0.5).view(())
    gain = (scale.to(wide) if isinstance(scale, Tensor) else like.new_full((), scale)) * width**0.5
    shift = None if shift is None else shift.to(wide)

    def norm(x: Tensor) -> Tensor:
        unit = x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)
        return unit * gain if shift is None else torch.addcmul(shift, unit, gain)

    return norm if dtype == wide else lambda x: norm(x.to(wide)).to(dtype)


class RMSNorm(nn.Module):
    """`rms_normalize` with a learned gain (`weight`, 1 at first) and bias (0): (..., width) -> (..., width)."""

    def __init__(self, width: int, eps: float = EPSILON) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """The result has x's dtype; gain and bias act before it is rounded to it."""
        return rms_norm(x, self.weight, self.bias, 1.0, self.eps)

    def prepared(self) -> Callable[[Tensor], Tensor]:
        """The same for one token at a time, while no weight changes; x in the weights' type."""
        weight, bias = self.weight.detach(), self.bias.detach()
        return prepared_norm(len(weight), weight, weight, bias, self.eps)
