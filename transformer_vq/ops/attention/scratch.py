"""Memory that an attention call needs inside, beside what goes in and comes out: its backend runs on fake tensors.

For a GPU on meta tensors: how much is worked on at once depends on the device, and those are not on a CPU.

Of a large call two smaller ones are run, and the line through them is followed: beyond a few chunks of work, what grows
is the copies of inputs, in proportion to rows and tokens.

Axes:  B batch  Hkv key heads  G queries a key head  T length  S codes  V value width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from transformer_vq.ops.attention.backends import TrainableBackend, backend_named
from transformer_vq.ops.attention.blocks import rows_at_once
from transformer_vq.ops.attention.call import Call
from transformer_vq.ops.attention.op import SIZE, flat, run_backward, run_forward, unflat
from transformer_vq.ops.kernels.device import rehearsal
from transformer_vq.ops.live_bytes import Inside, LiveBytes

WHOLE = 8
"""Chunks of queries (B·Hkv·G·T) up to which a call is run as it is."""


def inside(backend: Callable[[int], str], device: str) -> dict[Any, Inside]:
    """What `LiveBytes` asks about the ops of attention. backend: of a call of T tokens, where the model really runs.

    device: cpu | cuda, where that is. Calls that differ in numbers alone are run once.
    """
    known: dict[tuple[Any, ...], int] = {}

    def ask(values: Sequence[Any], keep: bool, backward: bool) -> int:
        call = unflat(values)
        key = (backward, keep, *((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in values[:SIZE]))
        if key not in known:
            call = replace(call, backend=backend(call.q.shape[3]))
            with nullcontext() if device == "cpu" else unset_fake_temporarily():
                known[key] = scratch(call if device == "cpu" else _on_meta(call), keep, backward)
        return known[key]

    ops = torch.ops.transformer_vq
    return {
        ops.attend.default: lambda *values: ask(values, values[SIZE], False),
        ops.attend_backward.default: lambda *values: ask(values, True, True),
    }


def scratch(call: Call, keep: bool, backward: bool) -> int:
    """Bytes. keep: a backward pass will follow. backward: this is it.  Call inside of FakeTensorMode."""
    if call.backend == "triton":
        with rehearsal():
            return _measured(call, keep, backward)
    rows, tokens = call.q.shape[0], call.q.shape[3]
    at = rows * tokens
    width = call.q.shape[1] * call.q.shape[2]
    b, t, whole = rows, tokens, WHOLE * rows_at_once(call.q.device)
    while b * t * width > whole and (b > 1 or t > 64):
        b, t = (b, t // 2) if t * width > whole // 2 or b == 1 else (-(-b // 2), t)
    large = _measured(_piece(call, b, t), keep, backward)
    if b * t == at:
        return large
    half = (b // 2, t) if b > 1 else (b, t // 2)
    small = _measured(_piece(call, *half), keep, backward)
    slope = max(0.0, (large - small) / (b * t - half[0] * half[1]))
    return round(large + slope * (at - b * t))


def _measured(call: Call, keep: bool, backward: bool) -> int:
    """Peak of one run, less what it returns."""
    notes: list[Tensor] = []
    d_o = o = call.v.new_empty(*call.q.shape[:4], call.v.shape[3])
    backend = backend_named(call.backend)
    if backward and isinstance(backend, TrainableBackend):
        notes = backend.notes(call)
    with LiveBytes() as live:
        made = run_backward(call, o, notes, d_o) if backward else run_forward(call, keep)
        scratch: int = live.peak - sum(x.untyped_storage().nbytes() for x in made)
        return scratch


def _on_meta(call: Call) -> Call:
    """The same shapes and types."""
    return unflat([torch.empty_like(x, device="meta") if isinstance(x, Tensor) else x for x in flat(call)])


def _piece(call: Call, rows: int, tokens: int) -> Call:
    """The first rows and tokens of a call."""

    def cut(x: Tensor, time: int | None = None) -> Tensor:
        """The batch is the first axis, `time` that of the tokens; axes of one stand for all."""
        x = x[:rows]
        return x if time is None or x.shape[time] == 1 else x.narrow(time, 0, tokens)

    return replace(
        call,
        q=cut(call.q, 3),
        k_hat=cut(call.k_hat, 2),
        v=cut(call.v, 2),
        codes=cut(call.codes, 2),
        bias=None if call.bias is None else cut(call.bias, 3),
        segments=None if call.segments is None else cut(call.segments, 1),
        run=None if call.run is None else cut(call.run, 1),
        length=cut(call.length),
        state=type(call.state)(*map(cut, call.state)),
    )
