"""Root-mean-square norm  [Zhang 1910.07467], with ε inside the root.

y = scale · x r · g + b,   r = 1 / sqrt(ε + mean(x²))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transformer_vq.ops import rows
from transformer_vq.ops.addresses import addressable


def rms_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, eps: float) -> Tensor:
    """(..., D) -> (..., D) in x's dtype, within fp32 or wider. weight g (D,) and bias b (D,), both or neither."""
    y: Tensor = RMSNormed.apply(x, weight, bias, scale, eps)  # type: ignore[no-untyped-call]
    return y


class RMSNormed(torch.autograd.Function):
    """By hand because autograd takes more passes over x, and keeps another tensor of its size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, eps: float) -> Tensor:
        """See `rms_norm`."""
        ctx.scale, ctx.eps = scale, eps
        if rows.possible(x, weight, bias):
            y, inverse = rows.norm(x, weight, bias, scale, eps)
            ctx.save_for_backward(x, inverse, weight)
            return y
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = inverse_rms(wide, eps)
        y = wide * (inverse if scale == 1.0 else inverse * scale)  # the scale on few numbers, not on all
        if weight is not None and bias is not None:
            y.mul_(weight).add_(bias)
        ctx.save_for_backward(x, inverse, weight)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        """With h = d_y g:  dx = scale r (h − x r² mean(h x)),  dg = scale Σ d_y x r,  db = Σ d_y over all rows."""
        x, inverse, weight = ctx.saved_tensors
        if rows.possible(x, weight) and addressable(inverse, d_y) and not torch.is_grad_enabled():
            return (*rows.norm_gradients(x, inverse, weight, d_y, ctx.scale), None, None)
        wide, d_y = x.to(inverse.dtype), d_y.to(inverse.dtype)
        if torch.is_grad_enabled():  # for a second derivative r is a function of x
            inverse = inverse_rms(wide, ctx.eps)
        outer, product = inverse * ctx.scale, d_y * wide
        d_weight = d_bias = None
        if weight is None:
            along, d_x = product.sum(-1, keepdim=True), d_y * outer
        else:
            flat, wide_weight = product.reshape(-1, x.shape[-1]), weight.to(inverse.dtype)
            along, d_x = (flat @ wide_weight).view_as(inverse), (d_y * wide_weight).mul_(outer)
            d_weight, d_bias = (flat * outer.view(-1, 1)).sum(0), d_y.reshape(flat.shape).sum(0)
            d_weight, d_bias = d_weight.to(weight.dtype), d_bias.to(weight.dtype)
        d_x = d_x.addcmul_(wide, along * inverse / x.shape[-1] * inverse * outer, value=-1)
        return d_x.to(x.dtype), d_weight, d_bias, None, None


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """r (..., 1)."""
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()
