"""The general straight-through form: forward is q itself, backward hands Gᵀg to the keys.

    k̂ = sg(q) + (G k − sg(G k)),   every entry of G detached, ∂k̂/∂k = G

Written as that sum, −0.0 becomes 0.0 and the value overflows with G k; computing G k as the output misses q in most
entries (rotation in fp32 at K = 128 hits q in 7 % of them). An autograd function that returns q is the exact form.

Axes:  … any leading axes  K key width. Each row (K numbers) has its own G, applied through inner products, never K×K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transformer_vq.ops.numerics import wide_dtype

Transpose = Callable[..., tuple[Tensor, Tensor | None]]
"""(k, q, g, dtype, *extra), wide and detached -> gradients of k (Gᵀg, in dtype) and of q (None: a constant)."""


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(k: Tensor, q: Tensor, transpose: Transpose, *extra: Any) -> Tensor:
        return q.view_as(q)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        k, q, ctx.transpose, *extra = inputs
        ctx.save_for_backward(k, q, *extra)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        k, q, *extra = (t.detach() for t in ctx.saved_tensors)  # G is a constant, also to a second derivative
        wide = wide_dtype(k, q, g)
        with torch.autocast(g.device.type, enabled=False):  # the geometry is fp32 or wider
            grad_k, grad_q = ctx.transpose(k.to(wide), q.to(wide), g.to(wide), k.dtype, *extra)
        return (grad_k.to(k.dtype), None if grad_q is None else grad_q.to(q.dtype), None, *(None for _ in extra))


def through(k: Tensor, q: Tensor, transpose: Transpose, *extra: Tensor) -> Tensor:
    """k, q (..., K) -> k̂ (..., K), bitwise q. `transpose` must be a function at module level; `extra` tensors are saved."""
    return _Through.apply(k, q, transpose, *extra)
