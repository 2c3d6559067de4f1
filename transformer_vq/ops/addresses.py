"""Which tensors compiled code may be handed by their address, and memory for what it returns."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter


def addressable(*tensors: Tensor) -> bool:
    """Whether these are numbers in a CPU's memory, and no one watches operations to make a graph or an estimate.

    Not so are fake tensors and other subclasses, those of `vmap`, zeros that are not stored, and views whose sign is
    turned as they are read.
    """
    if torch._C._len_torch_dispatch_stack() or torch._ops._len_torch_dispatch_stack_pre_dispatch():
        return False
    return all(
        type(x) in (Tensor, Parameter)
        and x.device.type == "cpu"
        and torch._C._has_storage(x)
        and not (x.is_neg() or x._is_zerotensor())
        for x in tensors
    )


def rows_like(x: Tensor) -> Tensor:
    """New memory laid out as x is, numbers of the last axis side by side."""
    made = torch.empty_like(x)
    return made if made.stride(-1) == 1 else x.new_empty(x.shape)
