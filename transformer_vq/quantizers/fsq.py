"""Finite scalar quantization of keys: project K → d, round each number to one of its levels, expand d → K.

The codebook is the expansion of every implied code, so a quantized key is one of its rows, bit for bit.

Axes:  B batch  H heads  T length  K key width  d rounded dimensions  S = Π levels codes
"""

from __future__ import annotations

from torch import Tensor

from transformer_vq.config.quantizer import FSQConfig
from transformer_vq.ops import fsq
from transformer_vq.ops.estimators.rows import ste
from transformer_vq.ops.nearest import lookup
from transformer_vq.quantizers.base import Quantized
from transformer_vq.quantizers.expansion import Expansion, Projection
from transformer_vq.quantizers.health import batch_health, code_counts
from transformer_vq.quantizers.losses import commitment, squared_distance
from transformer_vq.quantizers.scheduled import ScheduledQuantizer


class FiniteScalarQuantizer(ScheduledQuantizer):
    """`fsq` and `ifsq`: no codebook is learned but the projection and the expansion, by gradient."""

    config: FSQConfig

    def __init__(self, config: FSQConfig, heads: int, dim: int, seed: int = 0, layer: int = 0) -> None:
        super().__init__(config, seed, layer, started=True)
        d = len(config.levels)
        self.squash = "sigmoid" if config.kind == "ifsq" else "tanh"
        self.project = Projection(heads, dim, d, seed, layer)
        self.expand = Expansion(heads, d, dim, config.expansion, self.project, seed, layer)

    @property
    def codebook(self) -> Tensor:
        """(H, S, K): the expansion of every implied code."""
        values = fsq.implied_values(self.config.levels, self.project.weight.dtype, self.project.weight.device)
        return self.expand(values.expand(self.project.weight.shape[0], -1, -1))

    def forward(self, k: Tensor, mask: Tensor | None = None) -> Quantized:
        """k (B, H, T, K); mask (B, T), True where a token is real."""
        self.start_if_due(k, mask)
        levels = self.config.levels
        bounded = fsq.bound(self.project(k), levels, self.squash)
        values = fsq.round_to_levels(bounded.detach(), levels)
        codes = fsq.digits_to_codes(fsq.values_to_digits(values, levels), levels)
        nearest = lookup(self.codebook.detach().to(k.dtype), codes)
        half = values.new_tensor([n // 2 for n in levels])
        expanded = self.expand(ste(bounded / half, values))  # carries the gradient; `nearest` carries the value
        distance = squared_distance(k, nearest)
        loss = commitment(distance, mask)
        metrics = batch_health(k, nearest, distance.detach(), code_counts(codes, self.config.size, mask), mask)
        if self.warming_up:
            return Quantized(codes, k, loss.detach() * 0, loss.detach(), metrics)
        return Quantized(codes, ste(expanded.to(k.dtype), nearest), self.beta * loss, loss, metrics)
