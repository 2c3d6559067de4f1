"""VQ attention for processors in C++ (the folder cpp), compiled on its first use: linear time and memory.

Blockwise's mathematics; but a tile of 32 queries goes through logits, softmax and products while its numbers are in the
core's own cache, where blockwise writes them to memory between operations, and products leave out codes that have not
been met. Everything is fp32, or fp64 if queries or values are. A thread works on one key head of one row at a time, and
needs T·(8K + 3V) numbers for it at most, with documents T·(8K + 5V).

Letters: blocks.py.  Oracle: quadratic.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from transformer_vq.ops.addresses import addressable, rows_like
from transformer_vq.ops.attention import blockwise
from transformer_vq.ops.attention.block_length import NATIVE
from transformer_vq.ops.attention.blocks import Plan
from transformer_vq.ops.attention.blockwise import Manner, fair, layout, learned_gradients
from transformer_vq.ops.attention.by_hand import by_hand
from transformer_vq.ops.attention.call import Call
from transformer_vq.ops.attention.chunk import Inputs
from transformer_vq.ops.attention.rotary import turns
from transformer_vq.ops.kernels.compiler import NotCompiled, entry, library
from transformer_vq.ops.threads import cut, outer_threads, together

Tensors = dict[str, Tensor | None]
SOURCE = Path(__file__).parents[1] / "cpp" / "attention.cpp"
PIECES = 4
"""For each thread, where there are many rows: who is free takes the next."""


def refusal(device: torch.device | str) -> str | None:
    """Why this backend cannot run on a device, in one line; None where it can."""
    return refusal_of(torch.device(device).type, lack())


def refusal_of(kind: str, lacking: str | None) -> str | None:
    """The same, of a type of device and what `lack` says."""
    if kind != "cpu":
        return f"backend native: is for processors, and tensors are on {kind}; take triton, wide or blockwise"
    return None if lacking is None else f"backend native: {lacking}; take blockwise"


def lack() -> str | None:
    """Why nothing is compiled for this processor; None where it is."""
    try:
        library(SOURCE)
    except NotCompiled as error:
        return str(error)
    return None


def native(call: Call) -> Tensor:
    """`Call` -> o (B, Hkv, G, T, V), wide.  Raises ValueError where there is no library."""
    return by_hand(call, notes, forward, backward)


def notes(call: Call) -> list[Tensor]:
    """For the backward pass: logsumexp (B, Hkv, G, T), wide."""
    return [call.q.new_empty(call.q.shape[:4], dtype=call.wide_dtype)]


def forward(call: Call, notes: list[Tensor]) -> Tensor:
    """`Call` -> o, wide, and the notes filled."""
    plan, x = fitted(*layout(call, manner(call)))
    o = x.q.new_empty(*x.q.shape[:4], x.v.shape[3])
    run("attend", call, plan, x, lambda _: {"o": o, "lse": notes[0] if notes else None})
    return o[..., : call.v.shape[3]]


def backward(call: Call, o: Tensor, notes: list[Tensor], d_o: Tensor) -> list[Tensor]:
    """Gradients of `call.learned()`."""
    return learned_gradients(call, manner(call), lambda plan, x: gradients(call, plan, x, d_o, notes[0]))


def manner(call: Call) -> Manner:
    """All of it wide; scale and rotary positions are the library's."""
    L = NATIVE if call.gradients == "window" else max(1, min(call.block_len, call.q.shape[3]))
    return Manner(call.wide_dtype, L, rows=1, raw=True)


def fitted(plan: Plan, x: Inputs) -> tuple[Plan, Inputs]:
    """Keys and values of whole panels, with zeros; and rows without gaps."""
    panel = entry(SOURCE, "panel", x.q.dtype)()

    def fit(t: Tensor) -> Tensor:
        return whole_panels(t, t.shape[-1] + -t.shape[-1] % panel)

    made = Inputs(
        q=fit(x.q),
        q_far=None,  # the same queries, but for a turn that is the library's
        k=fit(x.k),
        k_far=None if x.k_far is None else fit(x.k_far),
        v=fit(x.v),
        bias=None if x.bias is None else x.bias.to(x.q.dtype).contiguous(),
        total=None if x.total is None else fit(x.total),
    )
    return replace(plan, codebook=fit(plan.codebook), total=fit(plan.total), count=plan.count.contiguous()), made


def whole_panels(x: Tensor, width: int) -> Tensor:
    """With zeros up to a width, and rows without gaps."""
    missing = width - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x if x.stride(-1) == 1 else x.contiguous()


class Piece(NamedTuple):
    """What one thread works on by itself: batch rows, key heads, and query heads a key head."""

    b: slice
    h: slice
    g: slice


def pieces(plan: Plan, x: Inputs) -> tuple[list[Piece], int]:
    """The work in pieces that share nothing but what they read, and the threads to share them; see `gradients`.

    One piece where there is little to do, or one head of one row.
    """
    B, Hkv, G, T, _ = x.q.shape
    whole = Piece(slice(0, B), slice(0, Hkv), slice(0, G))
    threads = outer_threads(x.q)
    if threads == 1 or B * Hkv * G * T * (plan.cached + plan.M + plan.L) < blockwise.WORTH_A_THREAD * threads:
        return [whole], 1
    if x.bias is not None and x.bias.shape[0] == 1 < B:  # rows share its gradient: as few parts as there may be
        heads = [whole._replace(h=h) for h in cut(Hkv, Hkv)]
        return heads if fair(Hkv, threads) else [whole._replace(b=b) for b in cut(B, threads)], threads
    if PIECES * threads <= B:
        return [whole._replace(b=b) for b in cut(B, PIECES * threads)], threads
    parts = next((p for p in range(1, G + 1) if G % p == 0 and fair(B * Hkv * p, threads)), G)
    return [Piece(b, h, g) for b in cut(B, B) for h in cut(Hkv, Hkv) for g in cut(G, parts)], threads


def gradients(call: Call, plan: Plan, x: Inputs, d_o: Tensor, lse: Tensor) -> Inputs:
    """Gradients of the inputs, where they exist.

    Pieces that have keys or a bias in common add to gradients of their own; these are summed in the pieces' order.
    """
    given, (plan, x) = x, fitted(plan, x)
    d_o = whole_panels(d_o.to(x.q.dtype), x.v.shape[3])
    added = Inputs(*(None if t is None else torch.zeros_like(t) for t in x._replace(q=None)))  # type: ignore[arg-type]
    grads = added._replace(q=rows_like(x.q))
    common = x.bias is not None and x.bias.shape[0] == 1 < x.q.shape[0]
    of_keys, of_bias = {0: grads}, {0: grads.bias}

    def tensors(piece: Piece) -> Tensors:
        g, b = piece.g.start, piece.b.start if common else 0
        if g not in of_keys:
            of_keys[g] = grads.with_own_keys()
        if b not in of_bias and grads.bias is not None:
            of_bias[b] = torch.zeros_like(grads.bias)
        mine = of_keys[g]._replace(bias=of_bias[b])
        return {"lse": lse, "d_o": d_o, **{f"d_{name}": t for name, t in mine._asdict().items()}}

    run("gradients", call, plan, x, tensors)
    for g in sorted(of_keys)[1:]:
        grads.add_keys(of_keys[g])
    for b in sorted(of_bias)[1:]:
        grads.bias.add_(of_bias[b])  # type: ignore[union-attr, arg-type]
    whole = [None if d is None or t is None else d[..., : t.shape[-1]] for d, t in zip(grads, given, strict=True)]
    return Inputs(*whole)  # type: ignore[arg-type]


def run(name: str, call: Call, plan: Plan, x: Inputs, tensors: Callable[[Piece], Tensors]) -> None:
    """Call an entry of the library on all the work. tensors: what a piece reads and writes beside."""
    division, threads = pieces(plan, x)
    turning = table(call)
    works = [work_on(call, plan, x, turning | tensors(piece), piece) for piece in division]
    measure, function = (entry(SOURCE, of, x.q.dtype) for of in ("size", name))
    measure.restype, function.restype = ctypes.c_int64, None
    size, threads = measure(ctypes.byref(works[0]), name == "gradients"), min(threads, len(works))
    memory = x.q.new_empty(threads, size, dtype=torch.uint8)
    if has_memory(x.q):  # fake tensors go through for what is allocated
        listed = (Work * len(works))(*works)
        job = Job(works=ctypes.addressof(listed), count=len(works), memory=memory.data_ptr(), size=size, places=threads)
        together(function, ctypes.byref(job), threads)


def table(call: Call) -> Tensors:
    """Cosine and sine (M+T+1, K/2) of rotary angles at positions −M … T−1, and at M."""
    if call.rotary is None:
        return {}
    if not addressable(call.rotary):
        return angles(call.rotary, call.window, call.q.shape[3], call.wide_dtype)
    return kept_angles(tuple(call.rotary.tolist()), call.window, call.q.shape[3], call.wide_dtype)


@lru_cache(maxsize=1)
def kept_angles(frequency: tuple[float, ...], M: int, T: int, dtype: torch.dtype) -> Tensors:
    """All layers have the same, and forward and backward pass; angles in fp64 take a while."""
    return angles(torch.tensor(frequency, dtype=torch.float64, device="cpu"), M, T, dtype)


def angles(frequency: Tensor, M: int, T: int, dtype: torch.dtype) -> Tensors:
    """See `table`."""
    device = frequency.device
    position = torch.cat([torch.arange(-M, T, device=device), torch.tensor([M], device=device)])
    cos, sin = turns(position, frequency, dtype)
    return {"cos": cos, "sin": sin}


class View(ctypes.Structure):
    """As in work.h."""

    _fields_ = [("at", ctypes.c_void_p), *((axis, ctypes.c_int64) for axis in "bhgt")]


class Work(ctypes.Structure):
    """As in work.h, in its order."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("b0", "b1", "h0", "h1", "g0", "g1")),
        *((name, ctypes.c_int64) for name in ("T", "K", "V", "S", "M", "L", "N")),
        *((name, ctypes.c_int64) for name in ("beyond", "windowed", "through", "two_sided", "half")),
        ("scale", ctypes.c_double),
        *((name, View) for name in ("q", "k", "k_far", "v", "bias", "codebook", "count", "total", "codes")),
        *((name, View) for name in ("query_run", "key_run", "cos", "sin", "o", "lse")),
        *((name, View) for name in ("d_o", "d_q", "d_k", "d_k_far", "d_v", "d_bias", "d_total")),
    ]


class Job(ctypes.Structure):
    """As in work.h, in its order."""

    _fields_ = [
        ("works", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "next")),
        ("memory", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("size", "places", "begun")),
    ]


AXES = {
    **dict.fromkeys(("q", "o", "d_o", "d_q", "bias", "d_bias", "lse"), "bhgt"),
    **dict.fromkeys(("k", "k_far", "v", "d_k", "d_k_far", "d_v", "total", "d_total", "codes", "count"), "bht"),
    **dict.fromkeys(("query_run", "key_run"), "bt"),
    **dict.fromkeys(("cos", "sin"), "t"),
    "codebook": "ht",
}
"""Of each tensor, in order; one more, which is dense, may follow. `t` is that of queries, keys or codes."""


def work_on(call: Call, plan: Plan, x: Inputs, more: Tensors, piece: Piece) -> Work:
    """What the library needs to know of a piece."""
    S, K = plan.codebook.shape[1:]
    of_plan = {name: getattr(plan, name) for name in ("codebook", "count", "total", "codes", "query_run", "key_run")}
    found = {**x._asdict(), **of_plan, **more}
    ends = {f"{axis}{i}": end for axis, at in piece._asdict().items() for i, end in enumerate((at.start, at.stop))}
    return Work(
        **ends,
        **{"T": x.q.shape[3], "K": K, "V": x.v.shape[3], "S": S, "M": plan.M, "L": plan.L, "N": plan.N},
        beyond=plan.beyond,
        windowed=plan.gradients == "window",
        through=plan.through,
        two_sided=call.rotary is not None or call.exact_window,
        half=0 if call.rotary is None else call.rotary.shape[0],
        scale=1.0 if plan.scale is None else plan.scale,
        **{name: view(found[name], axes) for name, axes in AXES.items() if found.get(name) is not None},
    )


def view(x: Tensor, axes: str) -> View:
    """An axis of one stands for all."""
    strides = {axis: step if size > 1 else 0 for axis, step, size in zip(axes, x.stride(), x.shape, strict=False)}
    return View(at=x.data_ptr() if has_memory(x) else 1, **strides)


def has_memory(x: Tensor) -> bool:
    """Whether there are numbers, not shapes alone."""
    return x.device.type == "cpu" and not isinstance(x, FakeTensor)
