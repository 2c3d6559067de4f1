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
        super().__init__(config, seed, layer)
        self.squash = "sigmoid" if str(config.kind) == "ifsq" else "tanh"
        self.project = Projection(heads, dim, len(config.levels), seed, layer)
        self.expand = Expansion(self.project, config.expansion, seed, layer)

    @property
    def codebook(self) -> Tensor:
        """(H, S, K): the expansion of every implied code."""
        weight = self.project.weight
        values = fsq.implied_values(self.config.levels, weight.dtype, weight.device)
        rows: Tensor = self.expand(values.expand(weight.shape[0], -1, -1))
        return rows

    def bounded(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """k (B, H, T, K) -> (B, H, T, d) each: the numbers before rounding, and the digits that they round to."""
        bounded = fsq.bound(self.project(k), self.config.levels, self.squash)
        return bounded, fsq.bounded_to_digits(bounded.detach(), self.config.levels)

    def find(self, k: Tensor) -> Tensor:
        """See the base."""
        return fsq.digits_to_codes(self.bounded(k)[1], self.config.levels)

    def quantize(self, k: Tensor, mask: Tensor | None) -> Quantized:
        """k (B, H, T, K), mask (B, T)."""
        levels = self.config.levels
        bounded, digits = self.bounded(k)
        codes = fsq.digits_to_codes(digits, levels)
        values = fsq.digits_to_values(digits, levels, bounded.dtype)
        expanded = self.expand(ste(bounded / fsq.half_widths(bounded, levels), values))
        nearest = lookup(self.codebook.detach().to(k.dtype), codes)
        distance = squared_distance(k, nearest)
        committed = commitment(distance, mask)
        metrics = batch_health(k, nearest, distance, code_counts(codes, self.config.size, mask), mask)
        quantized = ste(expanded.to(k.dtype), nearest)  # gradient of the first, value of the second
        return Quantized(codes, quantized, self.weighted(committed), committed, metrics)
