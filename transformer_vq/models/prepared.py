"""What a layer's weights alone determine, worked out once for decoding one token after another.

Only small weights are put side by side in copies; large ones are used where they lie.

Axes:   B batch  H heads  Hkv key heads  G = H/Hkv  D width  K key width  V value width  S codes  M window
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformer_vq.models.attention import VQAttention
from transformer_vq.models.norm import prepared_norm
from transformer_vq.models.positions import XLBias
from transformer_vq.ops.attention.step import Tables, per_head, tables
from transformer_vq.ops.nearest import distance_tables
from transformer_vq.ops.numerics import full_precision, wide_dtype
from transformer_vq.quantizers.nearest import NearestQuantizer

COPIED = 2**20
"""Weights up to so many numbers are copied to make one product of two; above, reading them takes longer than a call."""


def side_by_side(*maps: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Linear maps of one input (B, D), their results one beside the other (B, sum of widths)."""
    parts = [(m.weight.detach(), bias_of(m)) for m in maps]
    if sum(weight.numel() for weight, _ in parts) <= COPIED:
        biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in parts]
        bias = None if all(bias is None for _, bias in parts) else torch.cat(biases)
        parts = [(torch.cat([weight for weight, _ in parts]), bias)]
    if len(parts) == 1:
        weight, bias = parts[0]
        return lambda y: F.linear(y, weight, bias)
    return lambda y: torch.cat([F.linear(y, weight, bias) for weight, bias in parts], dim=1)


def bias_of(linear: nn.Linear) -> Tensor | None:
    """Its bias, without gradient, if it has one."""
    bias: Tensor | None = linear.bias
    return None if bias is None else bias.detach()


def added(linear: nn.Linear) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, y) -> x + W y + b, x (B, D)."""
    across, bias = linear.weight.detach().t(), bias_of(linear)
    if bias is None:
        return lambda x, y: torch.addmm(x, y, across)
    return lambda x, y: torch.addmm(x + bias, y, across)


def head_norm(layer: VQAttention, like: Tensor) -> Callable[[Tensor], Tensor]:
    """What `VQAttention.key_heads` does to (B, heads, K)."""
    K, eps = layer.config.key_dim, layer.config.norm_eps
    scale = K**-0.25  # a number: in 16 bits a tensor of it would be rounded
    return prepared_norm(K, scale, like, eps=eps) if layer.config.qk_norm else lambda x: x * scale


def finder(layer: VQAttention) -> Callable[[Tensor], Tensor]:
    """Keys (B, Hkv, K), fp32 or wider, to codes (B·Hkv, 1)."""
    quantizer = layer.quantizer
    if not isinstance(quantizer, NearestQuantizer):
        return lambda k: quantizer.find(k[:, :, None]).view(-1, 1)
    codebook, given = quantizer.codebook, wide_dtype(layer.norm.weight)
    wide = wide_dtype(codebook, layer.norm.weight)
    offset, across = distance_tables(codebook.to(wide), quantizer.metric)
    if len(across) == 1:
        offset, across = offset[0], across[0].contiguous()

        def find(k: Tensor) -> Tensor:
            return torch.addmm(offset, k[:, 0], across).argmin(1, keepdim=True)

    else:

        def find(k: Tensor) -> Tensor:
            return torch.baddbmm(offset, k.transpose(0, 1), across).argmin(2).t().reshape(-1, 1)

    if offset.device.type == "cpu" and wide == given:
        return find

    def find_exactly(k: Tensor) -> Tensor:
        with full_precision(k.device):  # the codes that `nearest_code` finds, whatever the user lets TF32 do
            return find(k.to(wide))

    return find_exactly


Placed = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Queries (B·Hkv, G, K) -> for the content logits, and a bias (Hkv or B·Hkv, G, M+1), the farthest key first."""


def placer(layer: VQAttention, wide: torch.dtype) -> tuple[Placed, Tensor | None]:
    """What the layer's positions do to a query of type `wide`, and rotary frequencies (K/2,) or None."""
    config, position = layer.config, layer.position
    H, Hkv, K = config.heads, config.key_value_heads, config.key_dim
    if isinstance(position, XLBias):
        u, v = (b.detach().to(wide).view(Hkv, -1, K) / position.tau for b in (position.u, position.v))
        rows = position.rows().to(wide).flip(1).mT.contiguous()  # (H, K, M+1)
        constant = torch.bmm(v.reshape(H, 1, K), rows)

        def xl(q: Tensor) -> tuple[Tensor, Tensor | None]:
            by_distance = per_head(q.reshape(-1, 1, K), rows)
            if len(q) == Hkv:
                return q + u, (by_distance + constant).view(*q.shape[:2], -1)
            content = (q.unflatten(0, (-1, Hkv)) + u).flatten(0, 1)
            return content, (by_distance.unflatten(0, (-1, H)) + constant).view(*q.shape[:2], -1)

        return xl, None
    _, bias, rotary = position(layer.norm.weight.new_zeros(1, H, 1, K, dtype=wide))
    bias = None if bias is None else bias.detach().to(wide).view(Hkv, H // Hkv, -1).flip(-1)
    return lambda q: (q, bias), rotary


def layer_tables(layer: VQAttention, rotary: Tensor | None) -> Tables:
    """The tables of `ops.attention.step` for a layer that quantizes."""
    like, config = layer.norm.weight, layer.config
    codebook = layer.quantizer.codebook.detach().to(like.dtype)  # the rows that keys become, in their type
    return tables(codebook.to(wide_dtype(like)), config.window, config.cache, rotary, layer.exact_window)
