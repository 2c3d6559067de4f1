"""Every backend as one op of PyTorch, opaque to the compiler: a whole model compiles into one graph, loops and all.

The op takes the tensors and settings of a `Call`, the backend's name among them, and returns o and the notes that the
backend leaves for its backward pass, which is an op of its own. Both schemas follow from the fields of `Call`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, get_type_hints

import torch
from torch import Tensor

from transformer_vq.ops.attention.backends import TrainableBackend, backend_named
from transformer_vq.ops.attention.call import Call
from transformer_vq.ops.attention.state import LEARNED, AttentionState
from transformer_vq.ops.numerics import autocast_type

TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    bool: "bool",
    str: "str",
    float | None: "float?",
}
"""Python's types, as the dispatcher calls them."""
NAMES = [field.name for field in fields(Call)]
HINTS = get_type_hints(Call)
CALL = ", ".join(
    ", ".join(f"Tensor state_{part}" for part in AttentionState._fields)
    if name == "state"
    else f"{TYPES[HINTS[name]]} {name}"
    for name in NAMES
)
SIZE = len(NAMES) - 1 + len(AttentionState._fields)
STATE = NAMES.index("state")
ORDER = [*NAMES[:STATE], *(f"state_{part}" for part in AttentionState._fields), *NAMES[STATE + 1 :]]


def attend(call: Call) -> Tensor:
    """`Call`, whose backend is a name, not `auto` -> o (B, Hkv, G, T, V) in v's type.

    Gradients reach q, k_hat, v, the bias and a linked state; they have none of their own.
    """
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in call.learned())
    o: Tensor = attend_op(*flat(call), keep)[0]
    return o


def flat(call: Call) -> list[Any]:
    """The fields of a call, its state's among them, in the order of the schema."""
    values = [getattr(call, name) for name in NAMES]
    return [*values[:STATE], *call.state, *values[STATE + 1 :]]


def unflat(values: Sequence[Any]) -> Call:
    """The inverse."""
    after = STATE + len(AttentionState._fields)
    state = AttentionState(*values[STATE:after])
    return Call(**dict(zip(NAMES, [*values[:STATE], state, *values[after:SIZE]], strict=True)))


@torch.library.custom_op("transformer_vq::attend", mutates_args=(), schema=f"({CALL}, bool keep) -> Tensor[]")
def attend_op(*values: Any) -> list[Tensor]:
    """o and, where `keep` says that a backward pass will follow, the backend's notes."""
    return run_forward(unflat(values), values[SIZE])


def run_forward(call: Call, keep: bool) -> list[Tensor]:
    """The op's own work."""
    backend = backend_named(call.backend)
    with torch.no_grad(), torch.autocast(autocast_type(call.q.device), enabled=False):
        if keep and isinstance(backend, TrainableBackend):
            notes = backend.notes(call)
            return [backend.forward(call, notes).to(call.v.dtype).contiguous(), *notes]
        return [backend(call).to(call.v.dtype).contiguous()]


@torch.library.custom_op(
    "transformer_vq::attend_backward",
    mutates_args=(),
    schema=f"({CALL}, Tensor o, Tensor[] notes, Tensor d_o) -> Tensor[]",
)
def attend_backward_op(*values: Any) -> list[Tensor]:
    """dL/do -> the gradients of `call.learned()`, in their types."""
    return run_backward(unflat(values), *values[SIZE:])


def run_backward(call: Call, o: Tensor, notes: list[Tensor], d_o: Tensor) -> list[Tensor]:
    """The op's own work."""
    backend = backend_named(call.backend)
    with recording(), torch.autocast(autocast_type(call.q.device), enabled=False):
        if isinstance(backend, TrainableBackend):
            with torch.no_grad():
                grads = backend.backward(call, o, notes, d_o)
        else:
            call = call.with_leaves()
            with torch.enable_grad():
                again = backend(call).to(o.dtype)
            grads = list(torch.autograd.grad(again, call.learned(), d_o, materialize_grads=True))
    if call.linked:  # slices of what holds the call's own as well, and an op's outputs share no memory
        own = len(grads) - len(LEARNED)
        grads = [*grads[:own], *(g.clone() for g in grads[own:])]
    return [laid_out(g, x) for g, x in zip(grads, call.learned(), strict=True)]


def laid_out(g: Tensor, x: Tensor) -> Tensor:
    """A gradient in its tensor's type, and in memory as `torch.empty_like` lays out what is like that."""
    strides = torch.empty_like(x, device="meta").stride()
    return g.to(x.dtype) if g.stride() == strides else torch.empty_like(x).copy_(g)


@contextmanager
def recording() -> Iterator[None]:
    """Let autograd record inside an op: PyTorch calls an op's function below the layer that does so."""
    keys = torch._C.DispatchKey
    with torch._C._PreserveDispatchKeyGuard():
        for key in (keys.AutogradFunctionality, keys.ADInplaceOrView):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        yield


@attend_op.register_fake
def _(*values: Any) -> list[Tensor]:
    call = on_one_device(unflat(values))
    o = call.v.new_empty(*call.q.shape[:4], call.v.shape[3])
    backend = backend_named(call.backend)
    return [o, *(backend.notes(call) if values[SIZE] and isinstance(backend, TrainableBackend) else [])]


@attend_backward_op.register_fake
def _(*values: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in on_one_device(unflat(values)).learned()]


def on_one_device(call: Call) -> Call:
    """Raise ValueError where tensors of a call are on several devices: fake tensors do not complain by themselves."""
    devices = {str(x.device) for x in flat(call) if isinstance(x, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"the tensors of one attention call are on {', '.join(sorted(devices))}: one device is needed")
    return call


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Tensors where PyTorch watches them, the rest beside."""
    ctx.rest = [None if isinstance(x, Tensor) else x for x in inputs[:SIZE]]
    ctx.places = [i for i, x in enumerate(inputs[:SIZE]) if isinstance(x, Tensor)]
    ctx.save_for_backward(*(inputs[i] for i in ctx.places), *output)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients of the op's inputs, None for all that is not learned."""
    values, tensors = list(ctx.rest), ctx.saved_tensors
    for i, x in zip(ctx.places, tensors, strict=False):
        values[i] = x
    o, *notes = tensors[len(ctx.places) :]
    d_o = torch.zeros_like(o) if grads[0] is None else grads[0]
    found = attend_backward_op(*values, o, notes, d_o)
    learned = [name for name in ("q", "k_hat", "v", "bias") if values[ORDER.index(name)] is not None]
    if values[ORDER.index("linked")]:
        learned += [f"state_{name}" for name in LEARNED]
    by_name = dict(zip(learned, found, strict=True))
    return (*(by_name.get(name) for name in ORDER), None)


attend_op.register_autograd(_backward, setup_context=_keep_for_backward)
