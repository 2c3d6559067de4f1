"""The general straight-through form: forward is q itself, backward hands Gᵀg to the keys.

    k̂ = sg(q) + (G k − sg(G k)),   every entry of G detached, ∂k̂/∂k = G

Written as that sum, −0.0 becomes 0.0 and the value overflows with G k; computing G k as the output misses q in most
entries (rotation in fp32 at K = 128 hits q in 7 % of them). An autograd function that returns q is the exact form.

Axes:  … any leading axes  T the last of them  K key width. Each row (K numbers) has its own G, applied through inner
products, never as a K×K matrix.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transformer_vq.ops.numerics import largest_entry, multiply_within, wide_dtype
from transformer_vq.ops.threads import outer_threads, share

ONE_THREAD = 2**15 - 1
"""Numbers that torch still gives to a single thread."""
CHUNK = 2**18
"""Numbers of a chunk: few enough for the processor's cache, enough that Python's calls do not count."""


class Pulled(NamedTuple):
    """Gᵀg, taken apart so that it can be kept finite: factor · pulled where ok, g elsewhere."""

    pulled: Tensor
    """(..., K)."""
    factor: Tensor
    """(..., 1), not negative."""
    ok: Tensor
    """(..., 1) bool: G exists; elsewhere G = I."""
    to_q: Tensor | None = None
    """(..., K): the gradient of q, where q is not a constant."""


Transpose = Callable[..., Pulled]
"""(k, q, g, *extra), all fp32 or wider and detached, g of largest entry 1 -> Gᵀg. A function at module level."""


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(k: Tensor, q: Tensor, transpose: Transpose | None, *extra: Tensor | float) -> Tensor:
        return q.view_as(q)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        k, q, ctx.transpose, *extra = inputs
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in extra]
        ctx.dtypes = (k.dtype, q.dtype)
        if ctx.transpose is not None:
            ctx.save_for_backward(k, q, *(x for x in extra if isinstance(x, Tensor)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rest = (None,) * (len(ctx.numbers) + 1)
        if ctx.transpose is None:
            return (grads[0].to(ctx.dtypes[0]), None, *rest)
        k, q, *tensors = (t.detach() for t in ctx.saved_tensors)  # G is a constant, also to a second derivative
        following = iter(tensors)
        extra = [next(following) if x is None else x for x in ctx.numbers]
        with torch.autocast(k.device.type, enabled=False):  # the geometry is fp32 or wider
            grad_k, grad_q = _by_chunks(k, q, grads[0], ctx.transpose, extra)
        return (grad_k, grad_q if ctx.needs_input_grad[1] else None, *rest)


def through(k: Tensor, q: Tensor, transpose: Transpose | None, *extra: Tensor | float) -> Tensor:
    """k, q (..., K) -> k̂ (..., K), bitwise q; the gradient of k by `transpose`, None meaning G = I.

    `extra` goes to `transpose` after g: numbers, or tensors that broadcast against k and have its number of axes.
    """
    k_hat: Tensor = _Through.apply(k, q, transpose, *extra)  # type: ignore[no-untyped-call]
    return k_hat


def _by_chunks(
    k: Tensor, q: Tensor, g: Tensor, transpose: Transpose, extra: list[Tensor | float]
) -> tuple[Tensor, Tensor | None]:
    """Gradients of k and q, chunk by chunk along T on a CPU, at once elsewhere and in compiled code.

    The thirty short passes over a chunk find it in the cache, and each chunk is one thread's: sharing every pass costs
    more in waiting than it saves, by a factor of six when the cores have other work.
    """
    T = k.shape[-2] if k.dim() > 1 else 1
    if T == 1 or k.device.type != "cpu" or torch.compiler.is_compiling() or k.numel() <= ONE_THREAD:
        return _pull(k, q, g, transpose, extra)
    recorded = torch.is_grad_enabled() and g.requires_grad  # for a second derivative: threads do not record
    threads = 1 if recorded else outer_threads(k)
    step = -(-T // max(threads, -(-k.numel() // CHUNK)))
    grad_k, lock = torch.empty_like(k), threading.Lock()
    to_q: list[Tensor] = []

    def work(start: int) -> None:
        part = (..., slice(start, start + step), slice(None))
        cut = [x[part] if isinstance(x, Tensor) and x.shape[-2] == T else x for x in extra]
        grad_k[part], mine = _pull(k[part], q[part], g[part], transpose, cut)
        if mine is not None:
            with lock:  # whether q has a gradient, `transpose` alone knows
                to_q[:] = to_q or [torch.empty_like(q)]
            to_q[0][part] = mine

    share(range(0, T, step), lambda: work, threads)
    return grad_k, to_q[0] if to_q else None


def _pull(
    k: Tensor, q: Tensor, g: Tensor, transpose: Transpose, extra: list[Tensor | float]
) -> tuple[Tensor, Tensor | None]:
    """Gᵀg in k's dtype, finite wherever g is, and the gradient of q or None."""
    wide = wide_dtype(k, q, g)
    g = g.to(wide)
    size = largest_entry(g).clamp_min(torch.finfo(wide).tiny)
    pulled, factor, ok, to_q = transpose(k.to(wide), q.to(wide), g / size, *extra)
    grad_k = torch.where(ok, multiply_within(size * factor, pulled, k.dtype), g.to(k.dtype))
    return grad_k, None if to_q is None else multiply_within(size, to_q, q.dtype)
