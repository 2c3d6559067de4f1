"""VQ attention for processors in C++ (the folder cpp), compiled on its first use: linear time and memory.

Blockwise's mathematics and its division of work among threads; but a tile of 32 queries goes through logits, softmax
and products while its numbers are in the core's own cache, where blockwise writes them to memory between operations,
and codes that have not been met cost nothing. Everything is fp32, or fp64 if queries or values are.

Letters: blocks.py.  Oracle: quadratic.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_vq.ops.attention.block_length import NATIVE
from transformer_vq.ops.attention.blocks import Plan
from transformer_vq.ops.attention.blockwise import Manner, Share, layout, learned_gradients, shares
from transformer_vq.ops.attention.by_hand import by_hand
from transformer_vq.ops.attention.call import Call
from transformer_vq.ops.attention.chunk import Inputs
from transformer_vq.ops.attention.rotary import turns
from transformer_vq.ops.kernels.compiler import NotCompiled, library
from transformer_vq.ops.threads import share

Tensors = dict[str, Tensor | None]
SOURCE = Path(__file__).with_name("cpp") / "attention.cpp"
ROWS = 4096
"""Queries that a thread takes at a time, at least, where rows are short."""


def refusal(device: torch.device | str) -> str | None:
    """Why this backend cannot run on a device, in one line; None where it can."""
    kind = torch.device(device).type
    if kind != "cpu":
        return f"backend native: is for processors, and tensors are on {kind}; take triton, wide or blockwise"
    try:
        library(SOURCE)
    except NotCompiled as error:
        return f"backend native: {error}; take blockwise"
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
    return Manner(call.wide_dtype, L, ROWS, raw=True)


def fitted(plan: Plan, x: Inputs) -> tuple[Plan, Inputs]:
    """Keys and values of whole panels, with zeros; and rows without gaps."""
    panel = getattr(library(SOURCE), f"panel_{named(x.q.dtype)}")()

    def fit(t: Tensor) -> Tensor:
        missing = -t.shape[-1] % panel
        return F.pad(t, (0, missing)) if missing else t if t.stride(-1) == 1 else t.contiguous()

    made = Inputs(
        q=fit(x.q),
        q_far=None,  # the same queries, but for a turn that is the library's
        k=fit(x.k),
        k_far=None if x.k_far is None else fit(x.k_far),
        v=fit(x.v),
        bias=None if x.bias is None else x.bias.to(x.q.dtype),
        total=None if x.total is None else fit(x.total),
    )
    return replace(plan, codebook=fit(plan.codebook), total=fit(plan.total)), made


def gradients(call: Call, plan: Plan, x: Inputs, d_o: Tensor, lse: Tensor) -> Inputs:
    """Gradients of the inputs, where they exist; each slice of query heads has keys, values and sums of its own."""
    given, (plan, x) = x, fitted(plan, x)
    d_o = d_o.to(x.q.dtype)
    d_o = F.pad(d_o, (0, x.v.shape[3] - d_o.shape[4])).contiguous()
    grads = Inputs(*(None if t is None else torch.zeros_like(t) for t in x))  # type: ignore[arg-type]
    of_slice = {0: grads}

    def tensors(first: int) -> Tensors:
        if first not in of_slice:
            of_slice[first] = grads.with_own_keys()
        return {"lse": lse, "d_o": d_o, **{f"d_{name}": t for name, t in of_slice[first]._asdict().items()}}

    run("gradients", call, plan, x, tensors)
    for first, more in sorted(of_slice.items()):
        if first:
            grads.add_keys(more)
    cut = [None if g is None or t is None else g[..., : t.shape[-1]] for g, t in zip(grads, given, strict=True)]
    return Inputs(*cut)  # type: ignore[arg-type]


def run(entry: str, call: Call, plan: Plan, x: Inputs, tensors: Callable[[int], Tensors]) -> None:
    """Call an entry of the library on all the work. tensors: what it reads and writes beside, by first query head."""
    real = type(x.q) is Tensor  # fake tensors go through for what is allocated
    compiled = getattr(library(SOURCE), f"{entry}_{named(x.q.dtype)}")
    compiled.restype = ctypes.c_int64
    pieces, threads = shares(plan, x)
    turning = table(call)
    works = [(piece, work_on(call, plan, x, turning | tensors(piece.groups.start))) for piece in pieces]

    def begin() -> Callable[[tuple[Share, Work]], None]:
        memory = x.q.new_empty(compiled(ctypes.byref(works[0][1])), dtype=torch.uint8)

        def work(item: tuple[Share, Work]) -> None:
            piece, whole = item
            for chunks in piece.chunks if real else []:
                b, h, g = chunks[0].b, chunks[0].h, piece.groups
                mine = Work.from_buffer_copy(whole)
                mine.b0, mine.b1, mine.h0, mine.h1, mine.g0, mine.g1 = b.start, b.stop, h.start, h.stop, g.start, g.stop
                mine.workspace = memory.data_ptr()
                compiled(ctypes.byref(mine))

        return work

    share(works, begin, threads)


def named(dtype: torch.dtype) -> str:
    """float32, float64."""
    return str(dtype).removeprefix("torch.")


def table(call: Call) -> Tensors:
    """Cosine and sine (M+T+1, K/2) of rotary angles at positions −M … T−1, and at M."""
    if call.rotary is None:
        return {}
    position = torch.cat([torch.arange(-call.window, call.q.shape[3]), torch.tensor([call.window])])
    cos, sin = turns(position, call.rotary, call.wide_dtype)
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
        ("workspace", ctypes.c_void_p),
    ]


AXES = {
    **dict.fromkeys(("q", "o", "d_o", "d_q", "bias", "d_bias", "lse"), "bhgt"),
    **dict.fromkeys(("k", "k_far", "v", "d_k", "d_k_far", "d_v", "total", "d_total", "codes", "count"), "bht"),
    **dict.fromkeys(("query_run", "key_run"), "bt"),
    **dict.fromkeys(("cos", "sin"), "t"),
    "codebook": "ht",
}
"""Of each tensor, in order; one more, which is dense, may follow. `t` is that of queries, keys or codes."""


def work_on(call: Call, plan: Plan, x: Inputs, more: Tensors) -> Work:
    """All that is the same for every list of one slice of query heads."""
    S, K = plan.codebook.shape[1:]
    of_plan = {name: getattr(plan, name) for name in ("codebook", "count", "total", "codes", "query_run", "key_run")}
    found = {**x._asdict(), **of_plan, **more}
    return Work(
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
    return View(at=x.data_ptr() if type(x) is Tensor else 1, **strides)
