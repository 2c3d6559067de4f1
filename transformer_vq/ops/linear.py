"""x Wᵀ + b for many rows x, in C++ (cpp/linear.cpp) on processors for which PyTorch's library is the slower one.

On AMD's processors that library keeps two cores at two thirds of what they can do, since its kernels begin as many
operations as they can while a neighbour of the core takes every second turn; ours begin fewer. All others take
PyTorch's, as do few numbers, 16 bits, subclasses of tensors, and whoever looks on or makes a graph.
Oracle: `torch.nn.functional.linear`.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from transformer_vq.machine import cpu_flags
from transformer_vq.ops.addresses import addressable
from transformer_vq.ops.kernels.compiler import compiles, entry
from transformer_vq.ops.threads import outer_threads, together

SOURCE = Path(__file__).with_name("cpp") / "linear.cpp"
WORTH_ROWS = 4096
"""Rows below which PyTorch's library is as quick, since they are in the cache already."""
WORTH_WIDTH = 96
"""Columns of x and of y below which copies take too large a part of the time."""
HIGH = 96
"""Rows of a piece of x Wᵀ, at most: they stay in a core's cache."""
SIDE = 384
"""Rows and columns of a piece of the weight's gradient, at most: what one is made of stays there."""
PIECES = 16
"""Of the weight's gradient, if it has fewer: then several are summed, each over its part of the rows."""
PART = 512
"""Rows of such a part, at least."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), W (N, K), b (N,) -> x Wᵀ + b (..., N), as `torch.nn.functional.linear`."""
    return by_library(x, weight, bias) if possible(x, weight, bias) else F.linear(x, weight, bias)


def by_library(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` where it is possible."""
    y: Tensor = Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


class Linear(torch.autograd.Function):
    """The three products of a linear map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `linear`."""
        for_x, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        return product(x, weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        """d_x = d_y W,  d_W = d_yᵀ x,  d_b = Σ d_y."""
        x, weight = ctx.saved_tensors
        given = [t for t in (x, weight, d_y) if t is not None]
        ours = not torch.is_grad_enabled() and addressable(*given) and all(t.dtype == torch.float32 for t in given)
        d_x = d_weight = d_bias = None
        if weight is not None:
            d_x = product(d_y, weight) if ours else d_y @ weight
        if x is not None:
            slopes, rows = as_rows(d_y), as_rows(x)
            d_weight = transposed(slopes, rows) if ours else slopes.t() @ rows
        if ctx.needs_input_grad[2]:
            d_bias = as_rows(d_y).sum(0)
        return d_x, d_weight, d_bias


def possible(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether such a product is made here."""
    given = (x, weight) if bias is None else (x, weight, bias)
    return (
        not torch.compiler.is_compiling()
        and quicker()
        and all(t.dtype == torch.float32 for t in given)
        and not _watched()
        and addressable(*given)
        and x.dim() > 1
        and weight.dim() == 2
        and x.numel() >= WORTH_ROWS * x.shape[-1]
        and min(weight.shape) >= WORTH_WIDTH
        and weight.shape[1] == x.shape[-1]
        and (bias is None or bias.shape == weight.shape[:1])
    )


def _watched() -> bool:
    """Whether PyTorch's own operation is asked for: by autocast, tracers, transforms of functions, modes."""
    return (
        torch.is_autocast_enabled("cpu")
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_function_stack() > 0
        or forward_ad._current_level >= 0
    )


@cache
def quicker() -> bool:
    """Whether this was measured on such a processor: AMD's with AVX2, and not AVX-512. And whether it is compiled."""
    vendor, flags = cpu_flags()
    return vendor == "AuthenticAMD" and "avx2" in flags and "avx512f" not in flags and compiles(SOURCE)


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """A B + b: (..., D), (D, N), (N,) -> (..., N)."""
    made = a.new_empty(*a.shape[:-1], b.shape[1])
    a, c = as_rows(a), as_rows(made)
    panel = entry(SOURCE, "panel", a.dtype)()
    missing = -b.shape[1] % panel
    panels = (F.pad(b, (0, missing)) if missing else b).unflatten(1, (-1, panel)).transpose(0, 1).contiguous()
    work = Work(
        **{"rows": len(a), "depth": len(b), "width": b.shape[1], "lda": a.stride(0), "ldc": c.stride(0)},
        **{"high": even(len(a), HIGH, outer_threads(a)), "a": a.data_ptr(), "b": panels.data_ptr(), "c": c.data_ptr()},
    )
    if bias is not None:
        bias = bias.contiguous()
        work.bias = bias.data_ptr()
    run("product", work, a)
    return made


def transposed(a: Tensor, b: Tensor) -> Tensor:
    """Aᵀ B: (M, D), (M, N) -> (D, N), rows dense."""
    M, D, N = len(a), a.shape[1], b.shape[1]
    high, wide = even(D, SIDE), even(N, SIDE)
    sums = -(-PIECES // (-(-D // high) * -(-N // wide)))
    deep = even(M, max(PART, -(-M // sums)), 2)
    c = a.new_empty(-(-M // deep), D, N)
    work = Work(
        **{"rows": D, "depth": M, "width": N, "lda": a.stride(0), "ldb": b.stride(0), "ldc": N},
        **{"high": high, "wide": wide, "deep": deep},
        **{"a": a.data_ptr(), "b": b.data_ptr(), "c": c.data_ptr()},
    )
    run("transposed", work, a)
    return c.squeeze(0) if len(c) == 1 else c.sum(0)


class Work(ctypes.Structure):
    """As in linear.cpp, in its order."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "depth", "width", "lda", "ldb", "ldc", "high", "wide", "deep")),
        *((name, ctypes.c_void_p) for name in ("next", "a", "b", "c", "bias")),
    ]


def run(name: str, work: Work, like: Tensor) -> None:
    """Call an entry of the library in all threads."""
    begun = ctypes.c_int64(0)
    work.next = ctypes.addressof(begun)
    together(entry(SOURCE, name, like.dtype), ctypes.byref(work), outer_threads(like))


def even(size: int, most: int, times: int = 1) -> int:
    """Size of parts, at most so large, of which there are a multiple of `times`, all of a size but for the last."""
    return -(-size // (times * -(-size // (times * most))))


def as_rows(x: Tensor) -> Tensor:
    """(..., D) -> (rows, D), numbers of a row side by side."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
