"""A backend with a backward pass of its own, under autograd outside of the op: as tests see it, and own backends that
call another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transformer_vq.ops.attention.call import Call

Notes = Callable[[Call], list[Tensor]]
Forward = Callable[[Call, list[Tensor]], Tensor]
Backward = Callable[[Call, Tensor, list[Tensor], Tensor], list[Tensor]]


def by_hand(call: Call, notes: Notes, forward: Forward, backward: Backward) -> Tensor:
    """`Call` -> o (B, Hkv, G, T, V) of the three functions, which are those of a `TrainableBackend`."""
    o: Tensor = ByHand.apply(call, notes, forward, backward, *call.learned())  # type: ignore[no-untyped-call]
    return o


class ByHand(torch.autograd.Function):
    """The three functions as one differentiable one."""

    @staticmethod
    def forward(ctx: Any, call: Call, notes: Notes, forward: Forward, backward: Backward, *learned: Tensor) -> Tensor:
        """`learned` are those of the call, where autograd sees them."""
        kept = notes(call)
        o = forward(call, kept)
        ctx.call, ctx.backward_pass = call, backward
        ctx.save_for_backward(o, *kept)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the learned tensors."""
        o, *kept = ctx.saved_tensors
        return None, None, None, None, *ctx.backward_pass(ctx.call, o, kept, d_o)
