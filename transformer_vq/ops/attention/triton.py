"""Fused VQ attention on a GPU: the kernels of `kernels/` as a backend, forward and backward, K and V up to 256.

What a block sees is computed twice, once for the forward and once for the backward pass, rather than kept: the inputs,
o and the logsumexp are all that is saved. No atomics: two runs give the same bits.

Blocks are those of the cache, C tokens long, and do not show in the result: under `gradients="window"` C is free, under
"block" it is a multiple of L, so that the strip of a query holds all keys that learn from it.

Axes:  B batch  H query heads  Hkv key heads  G = H/Hkv  T length  K, V widths  S codes  M window  N blocks
Oracle: quadratic.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from transformer_vq.config.extras import lack
from transformer_vq.ops.attention.call import Call
from transformer_vq.ops.attention.kernels.plan import Past, Plan
from transformer_vq.ops.attention.kernels.tiles import Tiles, tiles
from transformer_vq.ops.attention.rotary import rotate
from transformer_vq.ops.kernels.device import architecture, installed, interpreted
from transformer_vq.ops.nearest import lookup

WIDEST = 256


def refusal(device: torch.device | str) -> str | None:
    """Why the kernels cannot run on this device, in one line; None where they can."""
    if not installed():
        return f"{lack('triton', 'backend triton')}, or take blockwise"
    kind = torch.device(device).type
    if kind == "cpu" and not interpreted():
        return "backend triton: needs a GPU, and tensors are on cpu; TRITON_INTERPRET=1 interprets it there (very slow)"
    if kind not in ("cpu", "cuda", "meta"):  # without numbers: what memory it takes, and what is compiled
        return f"backend triton: needs a GPU, and tensors are on {kind}"
    return None


def supports(call: Call) -> None:
    """Raise ValueError, in one line, for a call that the kernels cannot do."""
    K, V = call.q.shape[-1], call.v.shape[-1]
    why = refusal(call.q.device)
    if why is None and max(K, V) > WIDEST:
        why = f"backend triton: keys and values are at most {WIDEST} wide, not K = {K}, V = {V}; take wide or blockwise"
    dtype = call.common_dtype
    on_cpu = call.q.device.type == "cpu"
    allowed = [torch.float16, torch.float32, torch.float64 if on_cpu else torch.bfloat16]
    if why is None and call.linked:
        why = "backend triton: gives a state no gradient, which a split sequence needs; take wide or blockwise"
    if why is None and dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        where = "the interpreter (its bfloat16 is wrong)" if on_cpu else "a GPU"
        why = f"backend triton: {where} takes {names}, not {str(dtype).removeprefix('torch.')}; take blockwise"
    if why is not None:
        raise ValueError(why)


class KernelInputs(NamedTuple):
    """What gets gradient. `far` is how a pair beyond the window is seen; None: as inside it."""

    q: Tensor
    """(B, H, T, K)."""
    q_far: Tensor | None
    k: Tensor
    """(B, Hkv, T, K)."""
    k_far: Tensor | None
    v: Tensor
    """(B, Hkv, T, V)."""
    bias: Tensor | None
    """(B or 1, H, T or 1, M+1)."""


def triton_attention(call: Call) -> Tensor:
    """`Call` -> o (B, Hkv, G, T, V). Raises ValueError for what the kernels cannot do."""
    plan, x = layout(call)
    o: Tensor = TritonAttention.apply(plan, *x)  # type: ignore[no-untyped-call]
    return by_group(o, call)


def notes(call: Call) -> list[Tensor]:
    """For the backward pass: the logsumexp, and o where v's type is not that of the products."""
    B, Hkv, G, T, _ = call.q.shape
    dtype = call.common_dtype
    made = [call.v.new_empty(B, Hkv * G, T, dtype=torch.promote_types(dtype, torch.float32))]
    return made if call.v.dtype == dtype else [*made, call.v.new_empty(B, Hkv, G, T, call.v.shape[3], dtype=dtype)]


def forward(call: Call, notes: list[Tensor]) -> Tensor:
    """`Call` -> o, and the notes filled."""
    from transformer_vq.ops.attention.launch import attend

    plan, x = layout(call)
    o, lse = attend(plan, *x)
    notes[0].copy_(lse)
    o = by_group(o, call)
    return notes[1].copy_(o) if len(notes) > 1 else o


def backward(call: Call, o: Tensor, notes: list[Tensor], d_o: Tensor) -> list[Tensor]:
    """Gradients of `call.learned()`."""
    from transformer_vq.ops.attention.launch import gradients

    call = call.with_leaves()
    with torch.enable_grad():
        plan, x = layout(call)
    o = notes[1] if len(notes) > 1 else o
    o, d_o = (rearrange(y, "b h g t v -> b (h g) t v") for y in (o, d_o.to(o.dtype)))
    fixed = KernelInputs(*(None if y is None else y.detach() for y in x))  # type: ignore[arg-type]
    grads = gradients(plan, *fixed, o, notes[0], d_o)
    pairs = [(y, g) for y, g in zip(x, grads, strict=True) if y is not None and y.requires_grad]
    found = torch.autograd.grad([y for y, _ in pairs], call.learned(), [g for _, g in pairs], materialize_grads=True)
    return list(found)


def by_group(o: Tensor, call: Call) -> Tensor:
    """(B, H, T, V) -> (B, Hkv, G, T, V)."""
    return rearrange(o, "b (h g) t v -> b h g t v", h=call.v.shape[1])


def layout(call: Call) -> tuple[Plan, KernelInputs]:
    """What gets no gradient, and what does, in one type. Raises ValueError for what the kernels cannot do."""
    supports(call)
    dtype, wide, M, T = call.common_dtype, call.wide_dtype, call.window, call.q.shape[3]
    q, k, v = (x.to(dtype) for x in (call.q, call.k_hat, call.v))
    q = rearrange(q, "b h g t k -> b (h g) t k")
    q_far = k_far = None
    past_k, past_far = call.state.k_hat, lookup(call.codebook, call.state.codes)
    if call.rotary is not None:
        at = torch.arange(T, device=q.device)
        q_far = rotate(q.to(wide), torch.full_like(at, M), call.rotary).to(dtype)
        q = rotate(q.to(wide), at, call.rotary).to(dtype)
        k, k_far = rotate(k.to(wide), at, call.rotary).to(dtype), k
        past_k = rotate(past_k.to(wide), torch.arange(-M, 0, device=q.device), call.rotary)
    if call.exact_window:
        q_far, k_far = q if q_far is None else q_far, lookup(call.codebook, call.codes).to(dtype)
    past = None
    if not call.fresh and M > 0:
        alive = call.state.alive.to(torch.int32) - 1
        past = Past(past_k.to(dtype), past_far.to(dtype), call.state.v.to(dtype), call.state.codes.contiguous(), alive)
    run = None if call.run is None else call.run.to(torch.int32).contiguous()
    count = call.state.count.to(wide)
    if run is not None:  # does the first block see the state's cache?
        count = count * (run[:, :1, None] == 0)
    more = q_far is not None or call.bias is not None or run is not None or past is not None
    chosen = tiles(architecture(q.device), q.shape[-1], v.shape[-1], dtype, more)
    plan = Plan(
        codes=call.codes.contiguous(),
        codebook=call.codebook.to(dtype).contiguous(),
        run=run,
        past=past,
        count=count.contiguous(),
        mean=call.state.mean.to(wide).contiguous(),
        M=M,
        C=renewal(call, chosen),
        L=call.block_len,
        scale=1.0 if call.scale is None else float(call.scale),
        cache=call.cache,
        gradients=call.gradients,
        through=call.grad_through_cache,
        tiles=chosen,
    )
    bias = None if call.bias is None else rearrange(call.bias, "b h g t m -> b (h g) t m")
    return plan, KernelInputs(q, q_far, k, k_far, v, bias)


def renewal(call: Call, chosen: Tiles) -> int:
    """Tokens between renewals of the cache: under `block` the multiple of L that fills tiles of queries best."""
    if call.gradients == "window":
        return chosen.renewal
    L, rows = call.block_len, chosen.forward.rows
    several = range(L, max(L, chosen.renewal) + 1, L)
    return max(several, key=lambda C: (C / (-(-C // rows) * rows), C))


class TritonAttention(torch.autograd.Function):
    """Forward and backward of one call."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        q: Tensor,
        q_far: Tensor | None,
        k: Tensor,
        k_far: Tensor | None,
        v: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """q (B, H, T, K), k (B, Hkv, T, K), v (B, Hkv, T, V), bias (B or 1, H, T or 1, M+1) -> o (B, H, T, V)."""
        from transformer_vq.ops.attention.launch import attend

        o, lse = attend(plan, q, q_far, k, k_far, v, bias)
        ctx.plan = plan
        ctx.save_for_backward(q, q_far, k, k_far, v, bias, o, lse)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, q_far, k, k_far, v and bias, where they exist."""
        from transformer_vq.ops.attention.launch import gradients

        return None, *gradients(ctx.plan, *[*ctx.saved_tensors, d_o])
