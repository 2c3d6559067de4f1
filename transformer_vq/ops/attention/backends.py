"""The table of backends, and what a backend may bring beside its forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from transformer_vq.ops.attention import blockwise, flash, native, triton, wide
from transformer_vq.ops.attention.call import Call
from transformer_vq.ops.attention.quadratic import quadratic
from transformer_vq.ops.attention.recurrent import recurrent
from transformer_vq.ops.resolve import resolve

Backend = Callable[[Call], Tensor]
"""`Call` -> o (B, Hkv, G, T, V), differentiable in q, k_hat, v and bias by PyTorch's own means."""


@dataclass(frozen=True)
class TrainableBackend:
    """A backend with a backward pass of its own. One without runs again under autograd in the backward pass."""

    attend: Backend
    notes: Callable[[Call], list[Tensor]]
    """Uninitialised tensors, by shapes alone, for what the forward pass leaves to the backward pass."""
    forward: Callable[[Call, list[Tensor]], Tensor]
    """`Call` -> o, without autograd; fills the notes."""
    backward: Callable[[Call, Tensor, list[Tensor], Tensor], list[Tensor]]
    """Call, o in v's type, notes and dL/do -> gradients of `call.learned()`, in that order."""

    def __call__(self, call: Call) -> Tensor:
        """Without the op around it, as tests and autograd see it."""
        return self.attend(call)


BACKENDS: dict[str, Backend] = {
    "quadratic": quadratic,
    "blockwise": TrainableBackend(blockwise.blockwise, blockwise.notes, blockwise.forward, blockwise.backward),
    "native": TrainableBackend(native.native, native.notes, native.forward, native.backward),
    "recurrent": recurrent,
    "triton": TrainableBackend(triton.triton_attention, triton.notes, triton.forward, triton.backward),
    "flash": TrainableBackend(flash.flash, flash.notes, flash.forward, flash.backward),
    "wide": TrainableBackend(wide.wide, wide.notes, wide.forward, wide.backward),
}


def backend_named(name: str) -> Backend:
    """A name in BACKENDS, or `module:function`. Raises ValueError that says what there is."""
    found: Backend = resolve(name, BACKENDS, "attention backend")
    return found
