"""Estimators that reach every code: a hard choice in the forward pass, the gradient of a softmax in the backward pass.

    θ_s = −‖k − c_s‖²/temperature,   k̂ = (D + π − sg(π))ᵀ C,   D the one-hot of the key's code, C the codebook
    ibq       π = softmax(θ)                                                    [Shi 2412.02692]
    gumbel    π = softmax(θ + noise/temperature), Gumbel noise                  [Jang 1611.01144]
    reinmax   π = 2 softmax(θ + sg(ln((D + softmax θ)/2) − θ)) − softmax(θ)/2   [Liu 2304.08612]

Shi's logits are inner products, and Liu's temperature enters only the softmax inside the logarithm; here θ is the same
in all three, so that they differ in one thing. At temperature 1 reinmax is the published one.

Keys get the gradient through π, the codebook through π and as the row that was taken. The choice is the nearest code
in all three, never a sample: a key in the attention's cache is known by its code alone, so forward must be that row.

No (T, S) matrix is kept: chunks of keys are recomputed in the backward pass.

Axes:  B batch  H heads  T length  K key width  S codes
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from transformer_vq.ops import counter
from transformer_vq.ops.estimators.noise import Source, as_noise
from transformer_vq.ops.numerics import full_precision, largest_entry, multiply_within, wide_dtype
from transformer_vq.ops.sums import add_rows

ALIVE = 2**20  # probabilities that exist at once, in a chunk of keys


def ibq(k: Tensor, q: Tensor, codebook: Tensor, codes: Tensor, temperature: float = 1.0) -> Tensor:
    """Gradient of a plain softmax.  k, q (B, H, T, K), codebook (H, S, K), codes (B, H, T) -> (B, H, T, K)."""
    k_hat: Tensor = _Soft.apply(k, q, codebook, codes, temperature, False, None)  # type: ignore[no-untyped-call]
    return k_hat


def gumbel(
    k: Tensor, q: Tensor, codebook: Tensor, codes: Tensor, generator: Source, temperature: float = 1.0
) -> Tensor:
    """Gradient of a softmax with Gumbel noise, which follows from `generator` (see noise.py)."""
    k_hat: Tensor = _Soft.apply(k, q, codebook, codes, temperature, False, as_noise(generator, k).tokens)  # type: ignore[no-untyped-call]
    return k_hat


def reinmax(k: Tensor, q: Tensor, codebook: Tensor, codes: Tensor, temperature: float = 1.0) -> Tensor:
    """Second-order gradient: twice that of the mean of choice and softmax, minus half that of the softmax."""
    k_hat: Tensor = _Soft.apply(k, q, codebook, codes, temperature, True, None)  # type: ignore[no-untyped-call]
    return k_hat


class _Soft(torch.autograd.Function):
    @staticmethod
    def forward(
        k: Tensor,
        q: Tensor,
        codebook: Tensor,
        codes: Tensor,
        temperature: float,
        second_order: bool,
        tokens: Tensor | None,
    ) -> Tensor:
        if codebook.dim() != 3 or k.dim() != 4 or codebook.shape[::2] != (k.shape[1], k.shape[3]):
            raise ValueError(f"codebook has shape {tuple(codebook.shape)}; keys {tuple(k.shape)} need (H, S, K)")
        return q.view_as(q)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        k, _, codebook, codes, ctx.temperature, ctx.second_order, tokens = inputs
        ctx.save_for_backward(k, codebook, codes, tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        k, codebook, codes, tokens = ctx.saved_tensors
        grad_k, grad_c = _soft_gradients(k, codebook, codes, grads[0], ctx.temperature, ctx.second_order, tokens)
        return grad_k, None, grad_c, None, None, None, None


def gradients(
    k: Tensor, codebook: Tensor, codes: Tensor, g: Tensor, temperature: float, second_order: bool, tokens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of keys and codebook, by heads, batch rows and chunks."""
    wide = wide_dtype(k, codebook, g)
    chunk = keys_at_once(codebook.shape[1])
    grad_k, grad_c = torch.empty_like(k), torch.zeros(codebook.shape, dtype=wide, device=k.device)
    with full_precision(k.device):
        for h, c in enumerate(codebook.to(wide)):
            for b, start in itertools.product(range(k.shape[0]), range(0, k.shape[2], chunk)):
                part = (b, h, slice(start, start + chunk))
                keys, slopes, taken = k[part].to(wide), g[part].to(wide), codes[part]
                noise = None if tokens is None else _gumbel(tokens[b, part[2]], h, c.shape[0])
                grad_k[part], to_c = _pull(keys, c, taken, slopes, temperature, second_order, noise, k.dtype)
                grad_c[h] += add_rows(to_c, taken, slopes)  # and as the row that was taken
    limit = torch.finfo(codebook.dtype).max
    return grad_k, grad_c.clamp(-limit, limit).to(codebook.dtype)


def keys_at_once(S: int) -> int:
    """A chunk: so many keys of a row and head."""
    return max(1, ALIVE // S)


_soft_gradients = torch.library.custom_op("transformer_vq::soft_gradients", gradients, mutates_args=())
"""Opaque to the compiler, as `nearest_code` is."""


@_soft_gradients.register_fake
def _(
    k: Tensor, codebook: Tensor, codes: Tensor, g: Tensor, temperature: float, second_order: bool, tokens: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(k), torch.empty_like(codebook)


def _pull(
    k: Tensor,
    c: Tensor,
    codes: Tensor,
    g: Tensor,
    temperature: float,
    second_order: bool,
    noise: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradients through π of one head's keys (N, K), in `dtype`, and of its codebook (S, K).

    Keys, codes and gradients are divided by their largest entries before they are multiplied; the products of those
    come back as factors, cut where they overflow: the softmax is a plain choice long before.
    A key that is not finite (or any, beside a codebook that is not) has G = I and no part in the codebook's gradient.
    """
    ok = k.isfinite().all(-1, keepdim=True) & c.isfinite().all()
    keys, codebook = torch.where(ok, k, 0.0), torch.where(c.isfinite().all(), c, 0.0)
    limits = torch.finfo(k.dtype)
    k_size, g_size = (largest_entry(x).clamp_min(limits.tiny) for x in (keys, g))
    c_size = codebook.abs().amax().clamp_min(limits.tiny)
    keys, codebook, slopes = keys / k_size, codebook / c_size, torch.where(ok, g / g_size, 0.0)

    most = limits.max / (8 * k.shape[-1])
    inner = (2 / temperature * c_size * k_size).clamp_max(most) * (keys @ codebook.T)
    theta = inner - (c_size / temperature * c_size).clamp_max(most) * codebook.square().sum(-1)  # ‖k‖² is common
    if noise is not None:
        theta += noise / temperature
    slope = _reinmax_slope if second_order else _softmax_slope
    to_theta = slope(theta, codes, slopes @ codebook.T)  # of π·(C g), in units of c_size · g_size

    pulled = multiply_within(2 / temperature * c_size * c_size * g_size, to_theta @ codebook, dtype)
    longest = torch.maximum(k_size.amax(), c_size)
    weight = to_theta * g_size
    to_c = weight.T @ (keys * (k_size / longest)) - weight.sum(0)[:, None] * codebook * (c_size / longest)
    return torch.where(ok, pulled, g.to(dtype)), multiply_within(2 / temperature * c_size * longest, to_c, k.dtype)


def _gumbel(tokens: Tensor, head: int, size: int) -> Tensor:
    """−ln(−ln u), (N, S) fp32, of a head's tokens (N) int64."""
    entries = head * size + torch.arange(size, device=tokens.device)
    return -(-counter.uniform(counter.bits(tokens[:, None], entries)).log()).log()


def _softmax_slope(theta: Tensor, codes: Tensor, a: Tensor) -> Tensor:
    """∂(π·a)/∂θ for π = softmax(θ); theta, a (N, S)."""
    return _through_softmax(theta.softmax(-1), a)


def _reinmax_slope(theta: Tensor, codes: Tensor, a: Tensor) -> Tensor:
    """The same for reinmax's π; codes (N) are the choice D."""
    p = theta.softmax(-1)
    middle = (p / 2).scatter_add_(1, codes[:, None], torch.full_like(p[:, :1], 0.5))
    return 2 * _through_softmax(middle, a) - _through_softmax(p, a) / 2


def _through_softmax(p: Tensor, a: Tensor) -> Tensor:
    return p * (a - (p * a).sum(-1, keepdim=True))
