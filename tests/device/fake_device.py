"""The whole model on a device that does not exist: what mixes devices, makes the host wait for one, or adds up in an
order that changes from run to run, is an error.

    python fake_device.py GUARD.so VARIANT ...        prints a JSON list of {variant, how, error}; null: all went well

Fake tensors have shapes, types and devices but no numbers: reading one on the host raises, as does an operation over
tensors on two devices, and a copy from the host, for which it waits too. A process of its own, because a guard that is
registered stays.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transformer_vq import TransformerVQ, TransformerVQConfig
from transformer_vq.ops.attention import BACKENDS, flash
from transformer_vq.ops.attention.arguments import Arguments
from transformer_vq.ops.attention.backends import backend_named
from transformer_vq.ops.attention.call import Call, prepare
from transformer_vq.ops.attention.carry import next_state
from transformer_vq.ops.attention.flash_kernels import OfPyTorch
from transformer_vq.ops.attention.op import flat

DEVICE = "ipu:0"
torch.ipu = SimpleNamespace()  # type: ignore[attr-defined]  # checkpointing asks for a device's module
SIZES: dict[str, Any] = {"vocab_size": 64, "layers": 2, "width": 32, "key_dim": 16, "value_dim": 32, "window": 16}
SIZES |= {"block_len": 16, "quantizer": {"kind": "vq", "codes": 32}}
VARIANTS: dict[str, dict[str, Any]] = {
    "xl": {"position": "xl"},
    "rotary": {"position": "rotary", "block": "transformer", "heads": 4, "kv_heads": 2, "conv": 3},
    "scalar": {"position": "scalar"},
    "none": {"position": "none", "cache": False},
    "paper": {"gradients": "block", "tied_embedding": True, "absolute_positions": True},
    "dropout": {f"dropout_{where}": 0.1 for where in ("embedding", "sinusoid", "residual", "layer")},
    "full": {"quantizer": {"kind": "none"}},
    "fsq": {"quantizer": {"kind": "fsq", "levels": [8, 4]}},
    "simvq": {"quantizer": {"kind": "simvq", "codes": 32}},
    **{
        name: {"quantizer": {"kind": "vq", "codes": 32, "codebook": "gradient", "estimator": name}}
        for name in ("rotation", "random_rotation", "diveq", "gumbel", "reinmax", "ibq")
    },
    "given": {"position": "rotary", "rotary_frequencies": [2.0**-i for i in range(8)]},
    "losses": {
        "quantizer": {
            "kind": "vq",
            "codes": 32,
            "codebook": "gradient",
            **{f"{term}_weight": 0.1 for term in ("orthogonality", "diversity", "wasserstein")},
        }
    },
    "dead codes": {"quantizer": {"kind": "vq", "codes": 32, "dead_code_threshold": 1.0}},
}


class NoCopies(TorchDispatchMode):
    """Copies from the host's memory to the device are errors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[-1] if func is torch.ops.aten.copy_.default else args[0]
            if source.device.type == "cpu" and any(x.device.type != "cpu" for x in tree_leaves(out)):
                raise RuntimeError("the host waits for a copy from its memory")
        return out


UNORDERED = ("index_add", "scatter_reduce", "index_reduce", "cumsum", "cumprod", "histc", "put_", "grid_sampler")
"""What PyTorch does on a GPU in any order; `index_put_` sorts, and `scatter_add` stands for a gather's gradient: here
all gather each number once, or with others whose gradients are zero.
"""
COUNTS = ("quantizers/health.py", "ops/attention/carry.py")
"""Where ones are added up, which is exact in any order."""


class OneOrder(TorchDispatchMode):
    """Sums of floats whose order is another in each run are errors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.startswith(UNORDERED) and args[0].is_floating_point():
            places = [frame.filename for frame in traceback.extract_stack()]
            if not any(place.endswith(COUNTS) for place in places):
                raise RuntimeError(f"{func} adds up in any order")
        return func(*args, **(kwargs or {}))


def on_device(model: TransformerVQ) -> TransformerVQ:
    """With fake tensors on the device in place of parameters and buffers; `.to()` cannot do that."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fake = torch.empty(p.shape, dtype=p.dtype, device=DEVICE)
                module._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=DEVICE)
    return model


def train(model: TransformerVQ, **inputs: torch.Tensor) -> None:
    """Two steps, the second from the state of the first."""
    tokens = torch.zeros(2, 64, dtype=torch.int64, device=DEVICE)
    out = model(tokens, labels=tokens, logits=False, **inputs)
    out.loss.backward()
    model.apply_codebook_statistics()
    model.set_step(1)
    model(tokens, state=out.state, labels=tokens, **inputs).loss.backward()
    model.apply_codebook_statistics()


def masked(model: TransformerVQ) -> None:
    """The same with documents and padding."""
    shape = (2, 64)
    train(
        model,
        segments=torch.zeros(shape, dtype=torch.int64, device=DEVICE),
        mask=torch.ones(shape, dtype=torch.bool, device=DEVICE),
    )


def decode(model: TransformerVQ) -> None:
    """A prompt, then one token."""
    tokens = torch.zeros(2, 64, dtype=torch.int64, device=DEVICE)
    model.eval()
    with torch.no_grad():
        state = model(tokens).state
        with model.frozen():
            model(tokens[:, :1], state=state)


def new(*shape: int, like: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor on the device."""
    return torch.zeros(shape, dtype=like, device=DEVICE)


def attention_calls(name: str) -> Iterator[Call]:
    """Two calls of a backend, in both types."""
    B, H, T, K, V, S, M = 2, 4, 24, 8, 8, 6, 5
    for dtype, rule in ((torch.float32, "window"), (torch.bfloat16, "block")):
        more: dict[str, Any] = {"rotary": new(K // 2), "mask": new(B, T, like=torch.bool)}
        if name != "flash":
            more |= {"bias": new(1, H, T, M + 1, like=dtype), "segments": new(B, T, like=torch.int64)}
        q, k_hat, v = (new(B, heads, T, width, like=dtype) for heads, width in ((H, K), (2, K), (2, V)))
        codes, codebook = new(B, 2, T, like=torch.int64), new(2, S, K, like=dtype)
        yield prepare(
            Arguments(q, k_hat, v, codes, codebook, window=M, block_len=4, gradients=rule, backend=name, **more)
        )


def unwrapped(name: str) -> None:
    """A backend without the op around it, whose fake would hide what it does: forward and backward, both types."""
    if name == "flash":  # its kernels know what shapes they give, whatever the device
        flash.refusal, flash.provider = lambda device: None, lambda device: OfPyTorch()  # type: ignore[assignment]
    for call in attention_calls(name):
        call = call.with_leaves()
        o = backend_named(name)(call)
        torch.autograd.grad(o.sum(), call.learned())
        next_state(call)


def inside(op: str) -> Callable[..., Any]:
    """What an opaque op does, of whose insides fake tensors see nothing. PyTorch has no public name for it."""
    body: Callable[..., Any] = OPDEFS[op]._init_fn
    return body


def opaque(op: str) -> None:
    """The insides of an op, with arguments that take every way through it."""
    body = inside(op)
    B, H, T, K, S = 2, 3, 24, 8, 6
    codes, rows = new(B, H, T, like=torch.int64), new(B * T, like=torch.int64)
    for dtype in (torch.float32, torch.bfloat16):
        k, codebook = new(B, H, T, K, like=dtype), new(H, S, K, like=dtype)
        match op.partition("::")[2]:
            case "nearest_code":
                for metric in ("euclidean", "cosine"):
                    body(k, codebook, metric)
            case "soft_gradients":
                for second_order, tokens in itertools.product((False, True), (None, new(B, T, like=torch.int64))):
                    body(k, codebook, codes, k, 0.5, second_order, tokens)
            case "add_rows":
                body(new(S, K, like=dtype), rows, new(B * T, K, like=dtype))
            case "attend":
                for call, keep in itertools.product(attention_calls("blockwise"), (False, True)):
                    body(*flat(call), keep)
            case "attend_backward":
                for call in attention_calls("blockwise"):
                    o, *notes = inside("transformer_vq::attend")(*flat(call), True)
                    body(*flat(call), o, notes, torch.zeros_like(o))
            case _:
                raise NotImplementedError(f"no arguments for {op}")


def planted(model: TransformerVQ) -> None:
    """A mistake, so that silence means something: a tensor of the host among those of the device."""
    tokens = torch.zeros(2, 64, dtype=torch.int64, device=DEVICE)
    model(tokens, mask=torch.ones(2, 64, dtype=torch.bool))


def waiting(model: TransformerVQ) -> None:
    """Another: the host reads a number."""
    float(model(torch.zeros(2, 64, dtype=torch.int64, device=DEVICE)).logits.sum())


def copying(model: TransformerVQ) -> None:
    """And another: a number of the host's goes to the device."""
    torch.tensor(1, device=DEVICE)


def mixed_inside(model: TransformerVQ) -> None:
    """The first again, where an op hides it."""
    inside("transformer_vq::nearest_code")(new(1, 2, 3, 4), torch.zeros(2, 5, 4), "euclidean")


def waiting_inside(model: TransformerVQ) -> None:
    """The second again, where an op hides it: which of two ways to go is read from the device."""
    k, codes = new(1, 2, 3, 4), new(1, 2, 3, like=torch.int64)
    inside("transformer_vq::soft_gradients")(k, new(2, 5, 4), codes, k, 1.0, new(like=torch.bool), None)


def adding(model: TransformerVQ) -> None:
    """And another: rows are added up by atomics."""
    new(5, 3).index_add_(0, new(7, like=torch.int64), new(7, 3))


def adding_gradients(model: TransformerVQ) -> None:
    """The same in a backward pass."""
    new(5, 3).requires_grad_().index_select(0, new(7, like=torch.int64)).sum().backward()


MISTAKES = (planted, waiting, copying, adding, adding_gradients, mixed_inside, waiting_inside)


def attempt(variant: str, how: str) -> str | None:
    """What went wrong, and where in the package; None: nothing."""
    try:
        if how in ("unwrapped", "opaque"):
            with FakeTensorMode(allow_non_fake_inputs=True), NoCopies(), OneOrder():
                {"unwrapped": unwrapped, "opaque": opaque}[how](variant)
            return None
        model = TransformerVQ(TransformerVQConfig(**SIZES | VARIANTS[variant]))
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = on_device(model).train()
            with NoCopies(), OneOrder():
                {f.__name__: f for f in (train, masked, decode, *MISTAKES)}[how](model)
    except Exception as error:  # whatever it is, it is the result
        frames = traceback.extract_tb(error.__traceback__)
        ours = [
            (f.filename.rpartition("transformer_vq/")[2], f.lineno) for f in frames if "transformer_vq/" in f.filename
        ]
        where = [f"{name}:{line}" for name, line in ours]
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} at {', '.join(where[-2:])}"
    return None


if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1])
    cases = [(variant, how) for variant in sys.argv[2:] for how in ("train", "masked", "decode")]
    cases += [("xl", f.__name__) for f in MISTAKES]
    cases += [(name, "unwrapped") for name in BACKENDS if name not in ("triton", "native")]  # not a GPU's
    cases += [(op, "opaque") for op in OPDEFS if op.startswith("transformer_vq::")]
    found = [{"variant": v, "how": how, "error": attempt(v, how)} for v, how in cases]
    print(json.dumps(found))
