"""SimVQ: a frozen random codebook times a learned linear map, so that every gradient moves every code.

    codebook = C W,   C (H, S, K) frozen, W (H, K, K) learned                                       [Zhu 2411.02038]

vector-quantize-pytorch 1.32.0 starts W as a random linear layer and averages the losses over the width, weighting the
commitment by 0.25 against the codebook's 1. Ours starts as the identity, on rows as long as the paper's keys, and
weighs sums: `commit` and `codebook_weight`.

Axes:  H heads  K key width  S codes
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transformer_vq.config.quantizer import SimVQConfig
from transformer_vq.ops.numerics import full_precision
from transformer_vq.quantizers.nearest import NearestQuantizer
from transformer_vq.quantizers.seeds import seeded


class SimVectorQuantizer(NearestQuantizer):
    """Buffer `frozen` (H, S, K), parameter `weight` (H, K, K)."""

    config: SimVQConfig
    frozen: Tensor

    def __init__(self, config: SimVQConfig, heads: int, dim: int, seed: int = 0, layer: int = 0) -> None:
        super().__init__(config, seed, layer)
        generator = seeded(seed, layer, "codebook")
        self.register_buffer("frozen", torch.randn(heads, config.size, dim, generator=generator) * dim**-0.25)
        self.weight = nn.Parameter(torch.eye(dim).repeat(heads, 1, 1))

    @property
    def codebook(self) -> Tensor:
        """(H, S, K), differentiable in `weight`."""
        with full_precision(self.weight.device):
            return self.frozen @ self.weight
