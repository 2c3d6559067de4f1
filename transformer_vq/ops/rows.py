"""What is done row by row between products of matrices, in C++ for processors (cpp/rows.cpp).

PyTorch goes through memory once for each operation of a formula, and shares each among its threads; here a row is read
once. Numbers are those of the formulas but for rounding.  Oracles: the formulas, in rms_norm.py and swiglu.py.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from transformer_vq.ops.kernels.compiler import NotCompiled, library
from transformer_vq.ops.threads import outer_threads, together

SOURCE = Path(__file__).with_name("cpp") / "rows.cpp"
AXES = 3
"""In front of the last one."""
WORTH = 2**12
"""Numbers below which PyTorch's operations are as quick."""
WORTH_A_THREAD = 2**15
"""Numbers for each thread, below which handing them over is not worth the while."""
PARTS = 4
"""For each thread: who is free takes the next."""


def possible(x: Tensor) -> bool:
    """Whether rows of x are worked here: many numbers that exist, fp32 or fp64, on a CPU for which there is a library.

    The compiler gets the formulas, of which it makes code of its own.
    """
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and type(x) is Tensor
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() >= max(1, WORTH)
        and x.dim() <= AXES + 1
        and x.stride(-1) == 1
        and _compiled()
    )


def _compiled() -> bool:
    try:
        library(SOURCE)
    except NotCompiled:
        return False
    return True


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, eps: float) -> tuple[Tensor, Tensor]:
    """y = scale x r · g + b, laid out as x is, and r (..., 1)."""
    y, inverse = torch.empty_like(x), torch.empty_like(x[..., :1])
    _run("norm", {"x": x, "y": y, "inverse": inverse}, {"weight": weight, "bias": bias}, scale, eps)
    return y, inverse


def norm_gradients(
    x: Tensor, inverse: Tensor, weight: Tensor | None, d_y: Tensor, scale: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dL/dx, laid out as x is, and dL/dg and dL/db (D,): sums over rows in fp64, of sums over a few."""
    d_x, tensors = torch.empty_like(x), {"x": x, "inverse": inverse, "d_y": d_y}
    if weight is None:
        _run("norm_gradients", {**tensors, "d_x": d_x}, {}, scale)
        return d_x, None, None
    sums = torch.zeros(_division(x)[1], 2, x.shape[-1], dtype=torch.float64, device="cpu")
    _run("norm_gradients", {**tensors, "d_x": d_x}, {"weight": weight, "sums": sums}, scale)
    d_weight, d_bias = sums.sum(0).to(weight.dtype)
    return d_x, d_weight, d_bias


def swiglu(joint: Tensor) -> Tensor:
    """[gate ; up] (..., 2 D) -> SiLU(gate) ⊙ up (..., D)."""
    y = joint.new_empty(*joint.shape[:-1], joint.shape[-1] // 2)
    _run("swiglu", {"x": joint, "y": y}, {})
    return y


def swiglu_gradients(joint: Tensor, d_y: Tensor) -> Tensor:
    """dL/d[gate ; up]."""
    d_joint = torch.empty_like(joint)
    _run("swiglu_gradients", {"x": joint, "d_y": d_y, "d_x": d_joint}, {})
    return d_joint


class Rows(ctypes.Structure):
    """As in rows.cpp."""

    _fields_ = [("at", ctypes.c_void_p), *((axis, ctypes.c_int64) for axis in "bht")]


class Work(ctypes.Structure):
    """As in rows.cpp, in its order."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("b", "h", "t", "width", "parts", "next")),
        *((name, ctypes.c_double) for name in ("scale", "eps")),
        *((name, Rows) for name in ("x", "y", "d_x", "d_y", "inverse")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "sums")),
    ]


def _run(
    entry: str, tensors: dict[str, Tensor], common: dict[str, Tensor | None], scale: float = 1.0, eps: float = 0.0
) -> None:
    """Call an entry of the library on all rows of `tensors`, with what they have in common."""
    x, width = tensors["x"], tensors["y" if "y" in tensors else "d_y"].shape[-1]
    threads, parts = _division(x)
    order = sorted(
        range(x.dim() - 1), key=lambda axis: x.stride()[axis], reverse=True
    )  # as rows of x follow each other in memory
    dense = {name: y if y.stride(-1) == 1 or y.shape[-1] == 1 else y.contiguous() for name, y in tensors.items()}
    shared = {name: y if name == "sums" else y.to(x.dtype).contiguous() for name, y in common.items() if y is not None}
    work = Work(
        *_three([x.shape[axis] for axis in order], 1),
        width=width,
        parts=parts,
        scale=scale,
        eps=eps,
        **{name: Rows(y.data_ptr(), *_three([y.stride(axis) for axis in order], 0)) for name, y in dense.items()},
        **{name: y.data_ptr() for name, y in shared.items()},
    )
    compiled = getattr(library(SOURCE), f"{entry}_{str(x.dtype).removeprefix('torch.')}")
    together(compiled, ctypes.byref(work), threads)


def _division(x: Tensor) -> tuple[int, int]:
    """Threads to work on rows of x, and the parts in which these take them."""
    threads = max(1, min(outer_threads(x), x.numel() // max(1, WORTH_A_THREAD)))
    return threads, PARTS * threads if threads > 1 else 1


def _three(numbers: list[int], missing: int) -> list[int]:
    return [*[missing] * (AXES - len(numbers)), *numbers]
