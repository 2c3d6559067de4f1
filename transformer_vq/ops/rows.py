"""What is done row by row between products of matrices, in C++ for processors (cpp/rows.cpp).

PyTorch goes through memory once for each operation of a formula, and shares each among its threads; here a row comes
from memory once. Numbers are those of the formulas but for rounding.  Oracles: the formulas, in rms_norm.py, swiglu.py.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from transformer_vq.ops.addresses import addressable, rows_like
from transformer_vq.ops.kernels.compiler import compiles, entry
from transformer_vq.ops.threads import outer_threads, together

SOURCE = Path(__file__).with_name("cpp") / "rows.cpp"
AXES = 3
"""In front of the last one."""
WIDEST = 2**16
"""Numbers of a row: a sum in fp32 over many more loses digits."""
WORTH = 2**12
"""Numbers below which PyTorch's operations are as quick."""
WORTH_A_THREAD = 2**15
"""Numbers for each thread, below which handing them over is not worth the while."""
PARTS = 4
"""For each thread: who is free takes the next."""


def possible(x: Tensor, *common: Tensor | None) -> bool:
    """Whether rows of x are worked here: many numbers, fp32 or fp64, on a CPU for which there is a library.

    common: what all rows share, all or none of it, a number for each of a row's. The compiler gets the formulas, of
    which it makes code of its own.
    """
    shared = [t for t in common if t is not None]
    return (
        not torch.compiler.is_compiling()
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() >= WORTH
        and x.dim() <= AXES + 1
        and x.shape[-1] <= WIDEST
        and x.stride(-1) == 1
        and len(shared) in (0, len(common))
        and all(t.shape == x.shape[-1:] for t in shared)
        and addressable(x, *shared)
        and compiles(SOURCE)
    )


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, eps: float) -> tuple[Tensor, Tensor]:
    """y = scale x r · g + b, laid out as x is, and r (..., 1)."""
    y, inverse = rows_like(x), x.new_empty(*x.shape[:-1], 1)
    _run("norm", {"x": x}, {"y": y, "inverse": inverse}, {"weight": weight, "bias": bias}, *_division(x), scale, eps)
    return y, inverse


def norm_gradients(
    x: Tensor, inverse: Tensor, weight: Tensor | None, d_y: Tensor, scale: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dL/dx, laid out as x is, and dL/dg and dL/db (D,): sums over rows in fp64, of sums over a few."""
    inputs, outputs, threads = {"x": x, "d_y": d_y}, {"inverse": inverse, "d_x": rows_like(x)}, _division(x)[0]
    if weight is None:
        _run("norm_gradients", inputs, outputs, {}, threads, threads, scale)
        return outputs["d_x"], None, None
    sums = torch.zeros(threads, 2, x.shape[-1], dtype=torch.float64, device="cpu")
    _run("norm_gradients", inputs, outputs, {"weight": weight, "sums": sums}, threads, threads, scale)
    d_weight, d_bias = (sums[:, i].sum(0).to(weight.dtype) for i in range(2))
    return outputs["d_x"], d_weight, d_bias


def swiglu(joint: Tensor) -> Tensor:
    """[gate ; up] (..., 2 D) -> SiLU(gate) ⊙ up (..., D)."""
    y = joint.new_empty(*joint.shape[:-1], joint.shape[-1] // 2)
    _run("swiglu", {"x": joint}, {"y": y}, {}, *_division(joint))
    return y


def swiglu_gradients(joint: Tensor, d_y: Tensor) -> Tensor:
    """dL/d[gate ; up], laid out as they are."""
    d_joint = rows_like(joint)
    _run("swiglu_gradients", {"x": joint, "d_y": d_y}, {"d_x": d_joint}, {}, *_division(joint))
    return d_joint


class Rows(ctypes.Structure):
    """As in rows.cpp."""

    _fields_ = [("at", ctypes.c_void_p), *((axis, ctypes.c_int64) for axis in "bht")]


class Work(ctypes.Structure):
    """As in rows.cpp, in its order."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("b", "h", "t", "width", "parts")),
        ("next", ctypes.c_void_p),
        *((name, ctypes.c_double) for name in ("scale", "eps")),
        *((name, Rows) for name in ("x", "y", "d_x", "d_y", "inverse")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "sums")),
    ]


def _run(
    name: str,
    inputs: dict[str, Tensor],
    outputs: dict[str, Tensor],
    common: dict[str, Tensor | None],
    threads: int,
    parts: int,
    scale: float = 1.0,
    eps: float = 0.0,
) -> None:
    """Call an entry of the library on all rows of `inputs` and `outputs`, with what rows have in common."""
    x, width = inputs["x"], (inputs | outputs)["y" if "y" in outputs else "d_y"].shape[-1]
    order = sorted(range(x.dim() - 1), key=lambda axis: x.stride()[axis], reverse=True)  # as rows follow in memory
    dense = {key: y if y.stride(-1) == 1 else y.contiguous() for key, y in inputs.items()} | outputs
    shared = {key: y if key == "sums" else y.to(x.dtype).contiguous() for key, y in common.items() if y is not None}
    begun = ctypes.c_int64(0)
    work = Work(
        *_three([x.shape[axis] for axis in order], 1),
        width=width,
        parts=parts,
        next=ctypes.addressof(begun),
        scale=scale,
        eps=eps,
        **{key: Rows(y.data_ptr(), *_three([y.stride(axis) for axis in order], 0)) for key, y in dense.items()},
        **{key: y.data_ptr() for key, y in shared.items()},
    )
    together(entry(SOURCE, name, x.dtype), ctypes.byref(work), threads)


def _division(x: Tensor) -> tuple[int, int]:
    """Threads to work on rows of x, and the parts in which these take them."""
    rows = x.numel() // x.shape[-1]
    threads = max(1, min(outer_threads(x), x.numel() // WORTH_A_THREAD, rows))
    return threads, min(rows, PARTS * threads) if threads > 1 else 1


def _three(numbers: list[int], missing: int) -> list[int]:
    return [*[missing] * (AXES - len(numbers)), *numbers]
