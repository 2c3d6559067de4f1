"""The one entry to VQ attention, and the choice of its backend."""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from transformer_vq.config.base import ConfigError
from transformer_vq.ops.attention import flash, native, triton
from transformer_vq.ops.attention.arguments import Arguments, taking
from transformer_vq.ops.attention.call import prepare
from transformer_vq.ops.attention.carry import next_state
from transformer_vq.ops.attention.choice import Look, choose
from transformer_vq.ops.attention.op import attend
from transformer_vq.ops.attention.padding import pick, real_first
from transformer_vq.ops.attention.state import AttentionState
from transformer_vq.ops.kernels.device import architecture, installed

REFUSALS = {
    "flash": flash.refusal,
    "native": lambda device: native.refusal_of(torch.device(device).type, native_lack()),
    "triton": triton.refusal,
}
"""Device -> why it cannot be the backend there, or None."""


@taking(Arguments)
def vq_attention(x: Arguments) -> tuple[Tensor, AttentionState]:
    """Causal attention over vector-quantized keys  [Lingle 2309.16354].

        logit(i,j) = scale·q_i·k̂_j + [i−j ≤ M] bias(i, i−j),   j ≤ i,   softmax over j, times v_j

    q (B, H, T, K); k_hat (B, Hkv, T, K), rows of the codebook; v (B, Hkv, T, V); codes (B, Hkv, T) int64;
    codebook (Hkv, S, K) -> o (B, H, T, V) in v's dtype, and the state for the next call. Hkv divides H, query head h
    reads key head h // (H/Hkv). Logits, counts, softmax and means are fp32 or wider, under autocast too.

    window              M: distances 0 … M see the exact key and its position; farther keys act through their code
    block_len           L: speed only; None: by counted cost. Under `gradients="block"` the reach of the gradient, and
                        needed
    scale               multiplies content logits; None = 1
    bias                (B or 1, H, T or 1, M+1), added at distance i−j; gets gradient
    rotary              (K/2,) radians per token: keys appear turned by min(i−j, M)
    state               what an earlier call returned; detached. None: nothing came before
    linked              the state is that of the piece before this one in the same sequence (split.py): its keys are
                        rows of this codebook, and gradient flows to its keys, values and means
    segments            (B, T) int64: attention never crosses a change of id. The state carries the last id, and a call
                        that starts with another starts empty; without segments it continues the state's document
    mask                (B, T) bool, True = real. Results are those of the sequence without its padding; o is 0 there
    cache               False: only the window is seen (the state is kept up all the same)
    gradients           "window": k_j and v_j learn from queries up to i = j+M. "block": the paper's, with s the start
                        of i's block: k_j from queries with j ≥ s−M, v_j from all
    grad_through_cache  "window": v_j learns from queries beyond j+M too. "block": False cuts all that lies before s
    exact_window        True: k_hat are the keys as they are, and the window sees them so; beyond it a key still acts
                        through its code. For `gradients="window"`
    backend             auto | a name in BACKENDS | module:function, a function `Call -> o`

    Raises ValueError with the shapes where arguments do not fit together.
    """
    with torch.autocast(x.q.device.type, enabled=False):
        call = prepare(x)
        K, V = x.q.shape[3], x.v.shape[3]
        name, _ = resolve_backend(x.backend, x.q.device, x.q.shape[2], K, V, call.common_dtype, x.linked)
        o = attend(replace(call, backend=name)) if x.q.shape[2] else x.v.new_zeros(*call.q.shape[:4], x.v.shape[3])
        o = rearrange(o, "b h g t v -> b (h g) t v")
        if x.mask is not None:
            back = torch.argsort(real_first(x.mask), dim=1)
            o = pick(o, back).masked_fill(~x.mask[:, None, :, None], 0)
        with torch.no_grad():
            return o, next_state(call)


def resolve_backend(
    name: str,
    device: torch.device | str,
    T: int,
    K: int,
    V: int,
    dtype: torch.dtype = torch.float32,
    linked: bool = False,
) -> tuple[str, str]:
    """The backend that a call of T tokens on `device` uses, and why; anything but `auto` is taken at its word.

    K, V: widths of keys and values; dtype: the widest of queries, keys and values; linked: see `vq_attention`.
    Raises ConfigError, a ValueError, in one line, where it cannot run on this device at all.
    """
    if name in REFUSALS and (why := REFUSALS[name](device)):
        raise ConfigError(why)
    if name != "auto":
        return name, "asked for by name"
    kind = torch.device(device).type
    arch, triton = kernels_on(torch.device(device)) if kind == "cuda" else (0, False)
    return choose(Look(kind, T, K, V, dtype, arch, triton, linked, native_lack() if kind == "cpu" else ""))


def kernels_on(device: torch.device) -> tuple[int, bool]:
    """Architecture of a GPU, and whether there is Triton: found before a compiler looks on."""
    return architecture(device), installed()


def native_lack() -> str | None:
    """Why there is nothing compiled for this processor: found before a compiler looks on."""
    return native.lack()


# All that `torch.compiler.assume_constant_result` does, which imports the whole compiler: a second at every start.
kernels_on._dynamo_marked_constant = True  # type: ignore[attr-defined]
native_lack._dynamo_marked_constant = True  # type: ignore[attr-defined]
