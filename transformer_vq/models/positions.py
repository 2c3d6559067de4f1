"""What a layer knows of positions: how it changes the queries, and what it adds to logits by distance.

Axes:   B batch  H heads  T length  K key width  D model width  M window
Each kind maps queries (B, H, T, K) to a `Positioned`: queries for the content logits, a bias (B or 1, H, T or 1, M+1)
by distance 0..M, and rotary frequencies (K/2).  Beyond the window no kind adds anything: a key there is only its code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from transformer_vq.config import TransformerVQConfig
from transformer_vq.models.dropout import common_draw, lasting_uniform
from transformer_vq.models.init import linear
from transformer_vq.ops.constants import lasting_constants


def sinusoid(positions: Tensor, width: int, base: float, dtype: torch.dtype) -> Tensor:
    """[sin(p f_0) … sin(p f_{D/2-1}), cos(p f_0) … cos(p f_{D/2-1})], f_m = base^(-2m/D)   [Vaswani 1706.03762]

    Not interleaved.  positions (...) integers -> (..., width) of `dtype`.
    Angles are fp64: at position 10⁶ an fp32 angle is off by 0.06.
    """
    angles = positions.double()[..., None] * frequencies(width, base, positions.device)
    return torch.cat([angles.sin(), angles.cos()], -1).to(dtype)


def frequencies(width: int, base: float, device: torch.device) -> Tensor:
    """base^(-2m/width) for m = 0 … width/2 - 1: (width/2,) fp64, radians per token."""
    return base ** (-torch.arange(0, width, 2, device=device, dtype=torch.float64) / width)


class Positioned(NamedTuple):
    """What attention gets from a position module; the fields are arguments of `vq_attention`."""

    q: Tensor
    bias: Tensor | None = None
    rotary: Tensor | None = None


class NoPosition(nn.Module):
    """Order is visible only through what is inside the window and what is beyond it."""

    def __init__(self, config: TransformerVQConfig, layer: int, generator: torch.Generator) -> None:
        super().__init__()

    def forward(self, q: Tensor, draws: Tensor | None = None) -> Positioned:
        """q (B, H, T, K), unchanged."""
        return Positioned(q)


class XLBias(nn.Module):
    """Transformer-XL's relative positions: (q_i + u/τ)·k̂_j + (q_i + v/τ)·r_{i-j}   [Dai 1901.02860; Lingle 2309.16354]

    r_δ = (sinusoid(δ) W_r)/τ for δ = 0..M, τ = K^(1/4): everything in the space of the scaled keys.
    """

    def __init__(self, config: TransformerVQConfig, layer: int, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.tau = config.key_dim**0.25
        self.r_proj = linear(config.width, config.heads * config.key_dim, generator)
        self.u = nn.Parameter(torch.zeros(config.heads * config.key_dim))  # head-major; one axis, as biases have:
        self.v = nn.Parameter(torch.zeros(config.heads * config.key_dim))  # weight decay and Muon leave it alone
        self.layer = layer
        self._rows: Tensor | None = None

    def rows(self, draws: Tensor | None = None) -> Tensor:
        """r of every distance: (H, M+1, K).

        draws (B,) int64, in training: the mask on the sinusoids follows from the first row's, and holds for all.
        """
        config, own = self.config, self.u  # not the projection's weight: a loader may hold that back until it is called
        distances = torch.arange(config.window + 1, device=own.device)
        table = sinusoid(distances, config.width, config.position_base, own.dtype)
        if self.training and config.dropout_sinusoid > 0:
            assert draws is not None
            place = torch.arange(table.numel(), device=table.device).view_as(table)
            keep = lasting_uniform(common_draw(draws), self.layer, place) >= config.dropout_sinusoid
            table = torch.where(keep, table / (1 - config.dropout_sinusoid), 0)
        r: Tensor = rearrange(self.r_proj(table), "distance (h k) -> h distance k", h=config.heads) / self.tau
        return r

    def freeze(self, frozen: bool) -> None:
        """Keep r for calls without gradients, or stop keeping it: see `TransformerVQ.frozen`."""
        self._rows = self.rows() if frozen else None

    def forward(self, q: Tensor, draws: Tensor | None = None) -> Positioned:
        """q (B, H, T, K) -> q + u/τ and a bias (B, H, T, M+1), in q's dtype."""
        r = self.rows(draws) if self._rows is None or torch.is_grad_enabled() else self._rows
        u, v = (b.view(self.config.heads, 1, -1) / self.tau for b in (self.u, self.v))
        content, position = (q + u).to(q.dtype), (q + v).to(q.dtype)
        return Positioned(content, bias=position @ r.to(q.dtype).transpose(-1, -2))


class ScalarBias(nn.Module):
    """One learned number for each head and distance, zero at first   [Raffel 1910.10683, without buckets]."""

    def __init__(self, config: TransformerVQConfig, layer: int, generator: torch.Generator) -> None:
        super().__init__()
        self.heads = config.heads
        self.bias = nn.Parameter(torch.zeros(config.heads * (config.window + 1)))  # one axis: see XLBias

    def forward(self, q: Tensor, draws: Tensor | None = None) -> Positioned:
        """q (B, H, T, K), unchanged, and a bias (1, H, 1, M+1)."""
        return Positioned(q, bias=self.bias.view(1, self.heads, 1, -1))


class Rotary(nn.Module):
    """Rotation of the query against the key by their distance, clipped at M   [Su 2104.09864]

    A cached code stands for keys at many distances, so beyond the window every key is seen at distance M: the output
    stays continuous and independent of the block length.  Unquantized (full) attention does not clip.
    """

    def __init__(self, config: TransformerVQConfig, layer: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.given = config.position_base, config.rotary_frequencies

    def forward(self, q: Tensor, draws: Tensor | None = None) -> Positioned:
        """q (B, H, T, K), unchanged, and frequencies (K/2,) in fp32 or wider."""
        wide = torch.promote_types(q.dtype, torch.float32)
        if self.given is None:
            return Positioned(q, rotary=frequencies(q.shape[-1], self.base, q.device).to(wide))
        return Positioned(q, rotary=lasting_constants(self.given, wide, q.device))


# one signature, by `config.position`
POSITIONS: dict[str, type[nn.Module]] = {"xl": XLBias, "scalar": ScalarBias, "rotary": Rotary, "none": NoPosition}
