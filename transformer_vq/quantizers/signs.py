"""Sign quantizers of keys: project K → d, take signs, expand d → K.

    lfq   c ∈ {±1}^d                       [Yu 2310.05737]
    bsq   z/‖z‖ first, c ∈ {±1/√d}^d       [Zhao 2406.07548]

The estimator passes the signs, in d dimensions; the expansion's own gradient passes the rest. The commitment loss is
the distance of the projected key and its signs, the papers' own, not that of the key and its expansion.

Axes:  B batch  H heads  T length  K key width  d binary dimensions  S = 2^d codes
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from transformer_vq.config.quantizer import BSQConfig, LFQConfig
from transformer_vq.ops import estimators, fsq
from transformer_vq.ops.estimators.rows import ste
from transformer_vq.ops.nearest import lookup
from transformer_vq.ops.signs import sign_entropies, signs
from transformer_vq.quantizers.base import Quantized
from transformer_vq.quantizers.expansion import Expansion, Projection
from transformer_vq.quantizers.health import batch_health, code_counts
from transformer_vq.quantizers.losses import commitment, squared_distance
from transformer_vq.quantizers.nearest import check_estimator
from transformer_vq.quantizers.scheduled import ScheduledQuantizer


class SignQuantizer(ScheduledQuantizer):
    """`lfq` and `bsq`."""

    config: LFQConfig | BSQConfig

    def __init__(self, config: LFQConfig | BSQConfig, heads: int, dim: int, seed: int = 0, layer: int = 0) -> None:
        super().__init__(config, seed, layer)
        check_estimator(config.estimator)
        self.spherical = config.kind == "bsq"
        self.length = config.bits**-0.5 if self.spherical else 1.0
        self.project = Projection(heads, dim, config.bits, seed, layer)
        self.expand = Expansion(self.project, config.expansion, seed, layer)

    @property
    def implied(self) -> Tensor:
        """(H, S, d): every code's signs, times their length."""
        weight, bits = self.project.weight, self.config.bits
        values = 2 * fsq.codes_to_digits(torch.arange(2**bits, device=weight.device), [2] * bits) - 1
        return (values.to(weight.dtype) * self.length).expand(weight.shape[0], -1, -1)

    @property
    def codebook(self) -> Tensor:
        """(H, S, K): the expansion of every code."""
        rows: Tensor = self.expand(self.implied)
        return rows

    def projected(self, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k (B, H, T, K) -> z and its signs' values (B, H, T, d), and the codes (B, H, T)."""
        z = self.project(k)
        if self.spherical:
            z = F.normalize(z, dim=-1)
        values = signs(z.detach()) * self.length
        return z, values, fsq.digits_to_codes((values > 0).long(), [2] * self.config.bits)

    def find(self, k: Tensor) -> Tensor:
        """See the base."""
        return self.projected(k)[2]

    def quantize(self, k: Tensor, mask: Tensor | None) -> Quantized:
        """k (B, H, T, K), mask (B, T)."""
        config = self.config
        z, values, codes = self.projected(k)
        passed = estimators.apply(
            config.estimator, z, values, self.implied.to(z.dtype), codes, self.noise, config.temperature, config.alpha
        )
        nearest = lookup(self.codebook.detach().to(k.dtype), codes)
        quantized = ste(self.expand(passed).to(k.dtype), nearest)  # gradient of the first, value of the second
        committed = commitment(squared_distance(z, values), mask)
        loss = self.weighted(committed)
        if config.entropy_weight:
            each, mean = sign_entropies(z, self.length, config.temperature, mask)
            loss = loss + config.entropy_weight * (each - mean)
        counts = code_counts(codes, config.size, mask)
        with torch.no_grad():
            metrics = batch_health(k, nearest, squared_distance(k, nearest), counts, mask)
        return Quantized(codes, quantized, loss, committed, metrics)
