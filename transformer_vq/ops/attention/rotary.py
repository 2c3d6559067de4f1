"""Rotary positions: pairs (x_c, x_{c+K/2}) turned by an angle  [Su 2104.09864].

Inside the window this is the usual rotary embedding, (R_i q_i)·(R_j k_j). A cached key has lost its position, so the
distance is clipped at the window: beyond it every key is seen through one fixed rotation of the query, (R_M q_i)·c_s.
The logit is then continuous in the distance, and still independent of the block length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transformer_vq.ops.attention.call import Call


class Rotation(torch.autograd.Function):
    """Pairs (a, b) of x (..., T, K) turned: (a·cos − b·sin, b·cos + a·sin); cos, sin (..., T, K/2), without gradient.

    By hand because one product of whole rows and two of halves, all in one tensor, take half the time of what autograd
    would record, and nothing has to be kept: gradients are turned back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See the class."""
        ctx.save_for_backward(cos, sin)
        y = x * torch.cat([cos, cos], dim=-1)
        (a, b), (left, right) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
        left.addcmul_(b, sin, value=-1)
        right.addcmul_(a, sin)
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None, None]:
        """The transpose of a rotation is its inverse."""
        cos, sin = ctx.saved_tensors
        d_x: Tensor = Rotation.apply(d_y, cos, -sin)  # type: ignore[no-untyped-call]
        return d_x, None, None


def rotate(x: Tensor, position: Tensor, frequency: Tensor) -> Tensor:
    """R_p x. x (..., T, K); position (..., T) or (T,) in tokens; frequency (K/2,) in radians per token -> (..., T, K).

    A 16-bit x is turned in fp32.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    turned: Tensor = Rotation.apply(x.to(wide), *turns(position, frequency, wide))  # type: ignore[no-untyped-call]
    return turned.to(x.dtype)


def turns(position: Tensor, frequency: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (..., T, K/2) of the angles, which are fp64: a position of 65,536 in fp32 is off by 4e-3."""
    angle = position.to(torch.float64)[..., None] * frequency.to(torch.float64)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def positioned(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Queries as they meet keys in the window and beyond, (B, Hkv, G, T, K) each; keys in the window (B, Hkv, M+T, K).

    Keys beyond the window are never turned. Without rotary positions both kinds of queries are the same tensor.
    """
    q, k = call.q, call.k_with_carried
    if call.rotary is None:
        return q, q, k
    position = torch.arange(-call.window, q.shape[3], device=q.device)
    clipped = torch.full_like(position[call.window :], call.window)
    near = rotate(q, position[call.window :], call.rotary)
    return near, rotate(q, clipped, call.rotary), rotate(k, position, call.rotary)
