"""SiLU(gate) ⊙ up of one tensor that holds both, side by side  [Shazeer 2002.05202]."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_vq.ops import rows
from transformer_vq.ops.addresses import addressable


def swiglu(joint: Tensor) -> Tensor:
    """Joint [gate ; up] (..., 2 D) -> SiLU(gate) ⊙ up (..., D)."""
    product: Tensor = Product.apply(joint)  # type: ignore[no-untyped-call]
    return product


class Product(torch.autograd.Function):
    """By hand because autograd would keep SiLU(gate) too, and lay both gradients side by side with a copy."""

    @staticmethod
    def forward(ctx: Any, joint: Tensor) -> Tensor:
        """See `swiglu`."""
        ctx.save_for_backward(joint)
        if joint.shape[-1] % 2 == 0 and rows.possible(joint):
            return rows.swiglu(joint)
        gate, up = joint.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Tensor:
        """With s = σ(g): d_up = d g s,  d_gate = d u s (1 + g (1 − s))."""
        (joint,) = ctx.saved_tensors
        if rows.possible(joint) and addressable(d_y) and not torch.is_grad_enabled():
            return rows.swiglu_gradients(joint, d_y)
        gate, up = joint.chunk(2, -1)
        d_joint = torch.empty_like(joint)
        d_gate, d_up = d_joint.chunk(2, -1)
        torch.ops.aten.silu.out(gate, out=d_up).mul_(d_y)
        d_silu = torch.mul(d_y, up, out=d_gate)
        torch.ops.aten.silu_backward.grad_input(d_silu, gate, grad_input=d_gate)
        return d_joint
