"""Encoder, decoder and PatchGAN discriminator: convolutions with residual blocks.

The autoencoder is the one of VQ-GAN (Esser 2012.09841), which the rotation paper trains (Fifty 2410.06424, code:
`multipliers` [1, 2, 4], `blocks` 2, width 128 for 64×64×3 latents; [1, 1, 2, 2, 4] with attention for 16×16×32).

Axes:   B batch  C channels  h, w height and width at that place  T = h·w positions
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformer_vq.ops import counter


def norm(channels: int) -> nn.GroupNorm:
    """Group norm with 32 groups, or as many as divide the channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


class PictureDropout(nn.Dropout):
    """Dropout that follows from names of the pictures, see ops/counter.py; without names torch's own."""

    states: Tensor | None = None
    """(B,) int64, set by the model before each of its forward passes."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> the same shape and dtype; the identity in evaluation."""
        if self.states is None or not self.training:
            return super().forward(x)
        return counter.drop(x.flatten(1), self.p, self.states).view_as(x)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); a 1×1 convolution on the way past where the channels change."""

    def __init__(self, channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(channels), norm(out_channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.dropout = PictureDropout(dropout)
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> (B, C', h, w)."""
        inner = self.conv1(F.silu(self.norm1(x)))
        out: Tensor = self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(inner))))
        return out


class SelfAttention(nn.Module):
    """One head over all positions, written out in matrix products: `hessian` differentiates it twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> the same."""
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)  # (B, C, T) each
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(x.shape[1]), dim=-1)  # (B, T, T)
        out: Tensor = x + self.out((v @ weights.transpose(1, 2)).unflatten(2, x.shape[2:]))
        return out


class Halve(nn.Module):
    """3×3 convolution of stride 2, padded right and below only: even sides are halved exactly."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> (B, C, h/2, w/2)."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Double(nn.Sequential):
    """Nearest neighbours, then a 3×3 convolution: (B, C, h, w) -> (B, C, 2h, 2w)."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1))


def middle(channels: int, attention: bool, dropout: float) -> list[nn.Module]:
    """Two residual blocks, with self-attention between them on request."""
    between: list[nn.Module] = [SelfAttention(channels)] if attention else []
    return [ResidualBlock(channels, channels, dropout), *between, ResidualBlock(channels, channels, dropout)]


class Encoder(nn.Sequential):
    """Pictures (B, C, h, w) to latents (B, latent_channels, h / 2^n, w / 2^n), n = len(multipliers) - 1."""

    def __init__(
        self,
        channels: int,
        latent_channels: int,
        width: int,
        multipliers: Sequence[int],
        blocks: int,
        attention: str = "none",
        dropout: float = 0.0,
    ) -> None:
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        at, last = width, len(multipliers) - 1
        for level, factor in enumerate(multipliers):
            for _ in range(blocks):
                layers.append(ResidualBlock(at, width * factor, dropout))
                at = width * factor
                if attention == "lowest" and level == last:
                    layers.append(SelfAttention(at))
            if level < last:
                layers.append(Halve(at))
        layers += [*middle(at, attention != "none", dropout), norm(at), nn.SiLU()]
        super().__init__(*layers, nn.Conv2d(at, latent_channels, 3, padding=1))


class Decoder(nn.Sequential):
    """The encoder's mirror, with one block more per resolution; its last layer is `decoder[-1]`."""

    def __init__(
        self,
        channels: int,
        latent_channels: int,
        width: int,
        multipliers: Sequence[int],
        blocks: int,
        attention: str = "none",
        dropout: float = 0.0,
    ) -> None:
        at, last = width * multipliers[-1], len(multipliers) - 1
        layers: list[nn.Module] = [
            nn.Conv2d(latent_channels, at, 3, padding=1),
            *middle(at, attention != "none", dropout),
        ]
        for level, factor in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                layers.append(ResidualBlock(at, width * factor, dropout))
                at = width * factor
                if attention == "lowest" and level == last:
                    layers.append(SelfAttention(at))
            if level > 0:
                layers.append(Double(at))
        super().__init__(*layers, norm(at), nn.SiLU(), nn.Conv2d(at, channels, 3, padding=1))


def patches(layers: int, side: int) -> int:
    """How many patches a `PatchDiscriminator` judges along a side of so many pixels; below 1 it cannot judge."""
    return (side >> max(layers, 1)) - 2


class PatchDiscriminator(nn.Sequential):
    """A logit for every patch: real or reconstructed  [Isola 1611.07004].

    Group norm where the source has batch norm, which would make the result depend on micro-batches and processes.
    """

    def __init__(self, channels: int, width: int, layers: int) -> None:
        stack: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        at = width
        for level in range(1, layers + 1):
            out = width * min(2**level, 8)
            stride = 2 if level < layers else 1
            stack += [nn.Conv2d(at, out, 4, stride=stride, padding=1, bias=False), norm(out), nn.LeakyReLU(0.2)]
            at = out
        super().__init__(*stack, nn.Conv2d(at, 1, 4, padding=1))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
