"""Other people's attention, where it is installed and able: a step of it, or why there is none.

Each gets the same queries, keys and values (B, H, T, D) and does forward and backward. What is no softmax attention
(`fla`'s gated delta net and GLA) is here for its speed: it computes something else. Our own full attention is the layer
of `quantizer.kind: none`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from transformer_vq.bench.comparison import Step
from transformer_vq.config.extras import lack
from transformer_vq.ops.attention import full_attention


class Heads(NamedTuple):
    """What all contestants read; the first three require gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    slope: Tensor
    """The gradient that comes back to the output."""

    def backward(self, o: Tensor) -> None:
        """Gradients of all three."""
        torch.autograd.grad(o, (self.q, self.k, self.v), self.slope)


def sdpa(x: Heads) -> Step:
    """PyTorch's own choice."""
    return lambda: x.backward(F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, scale=1.0))


def own_full(x: Heads) -> Step:
    """Of this package."""
    return lambda: x.backward(full_attention(x.q, x.k, x.v, window=0)[0])


def cudnn(x: Heads) -> Step | str:
    """SDPA by cuDNN, the fastest full attention on Hopper."""
    if why := _only_on_gpu(x):
        return why

    def step() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            x.backward(F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, scale=1.0))

    return step


def flash(x: Heads) -> Step | str:
    """Package flash-attn."""
    if why := _missing("flash_attn") or _only_on_gpu(x):
        return why
    from flash_attn import flash_attn_func

    def step() -> None:
        q, k, v = (t.transpose(1, 2) for t in x[:3])
        x.backward(flash_attn_func(q, k, v, causal=True, softmax_scale=1.0).transpose(1, 2))

    return step


def gated_delta_net(x: Heads) -> Step | str:
    """Package flash-linear-attention."""
    if why := _missing("fla") or _only_on_gpu(x):
        return why
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def step() -> None:
        q, k, v = (t.transpose(1, 2) for t in x[:3])
        gate = torch.zeros(q.shape[:3], device=q.device)
        beta = torch.full(q.shape[:3], 0.5, device=q.device, dtype=q.dtype)
        x.backward(chunk_gated_delta_rule(q, F.normalize(k, dim=-1), v, gate, beta)[0].transpose(1, 2))

    return step


def gla(x: Heads) -> Step | str:
    """Package flash-linear-attention."""
    if why := _missing("fla") or _only_on_gpu(x):
        return why
    from fla.ops.gla import chunk_gla

    def step() -> None:
        q, k, v = (t.transpose(1, 2) for t in x[:3])
        x.backward(chunk_gla(q, k, v, torch.zeros_like(k, dtype=torch.float32))[0].transpose(1, 2))

    return step


RIVALS: dict[str, Callable[[Heads], Step | str]] = {
    "SDPA": sdpa,
    "SDPA, cuDNN": cudnn,
    "ours, full": own_full,
    "flash-attn": flash,
    "gated delta net": gated_delta_net,
    "gla": gla,
}


def _missing(module: str) -> str | None:
    return None if find_spec(module) else lack(module)


def _only_on_gpu(x: Heads) -> str | None:
    return None if x.q.is_cuda else "needs a CUDA device"
