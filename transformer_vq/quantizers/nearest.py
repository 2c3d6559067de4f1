"""Kinds whose code is the nearest row of a codebook: what `vq` and `simvq` share.

Axes:  B batch  H heads  T length  K key width  S codes
"""

from __future__ import annotations

from torch import Tensor

from transformer_vq.config.base import ConfigError
from transformer_vq.config.quantizer import SimVQConfig, VQConfig
from transformer_vq.ops import estimators
from transformer_vq.ops.nearest import lookup, nearest_code
from transformer_vq.quantizers.base import Quantized
from transformer_vq.quantizers.health import batch_health, code_counts
from transformer_vq.quantizers.losses import commitment, squared_distance
from transformer_vq.quantizers.scheduled import ScheduledQuantizer


class NearestQuantizer(ScheduledQuantizer):
    """Looks up, estimates, and weighs the losses. Subclasses own the codebook."""

    config: VQConfig | SimVQConfig
    metric = "euclidean"

    def __init__(self, config: VQConfig | SimVQConfig, seed: int, layer: int, *, sees_keys_first: bool = False) -> None:
        super().__init__(config, seed, layer, sees_keys_first=sees_keys_first)
        check_estimator(config.estimator)
        self.has_noise = estimators.draws(config.estimator)

    def find(self, k: Tensor) -> Tensor:
        """See the base."""
        return nearest_code(k, self.codebook, self.metric)

    def quantize(self, k: Tensor, mask: Tensor | None) -> Quantized:
        """k (B, H, T, K), mask (B, T)."""
        codebook = self.codebook
        codes = nearest_code(k, codebook, self.metric)
        nearest = lookup(codebook.to(k.dtype), codes)
        distance = squared_distance(k, nearest.detach())
        committed = commitment(distance, mask)
        counts = code_counts(codes, self.config.size, mask)
        metrics = batch_health(k, nearest, distance, counts, mask) | self.running_metrics()
        if self.training and not self.warming_up:
            self.collect(k, codes, counts, mask)
        loss = self.weighted(committed) + self.codebook_loss(k, nearest, codebook, mask)
        return Quantized(codes, self.estimate(k, nearest, codebook, codes, mask), loss, committed, metrics)

    def estimate(self, k: Tensor, nearest: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None) -> Tensor:
        """`nearest`, with the gradient of the chosen estimator."""
        name, temperature, alpha = self.config.estimator, self.config.temperature, self.config.alpha
        noise = self.names(k, mask) if self.has_noise else None
        return estimators.apply(name, k, nearest, codebook, codes, noise, temperature, alpha)

    def codebook_loss(self, k: Tensor, nearest: Tensor, codebook: Tensor, mask: Tensor | None) -> Tensor | float:
        """What moves the codebook by gradient, weighted: the commitment's distance with its roles exchanged."""
        return self.config.codebook_weight * commitment(squared_distance(k.detach(), nearest), mask)

    def collect(self, k: Tensor, codes: Tensor, counts: Tensor, mask: Tensor | None) -> None:
        """Take notes of a forward pass in training."""

    def running_metrics(self) -> dict[str, Tensor]:
        """Metrics beside those of the batch."""
        return {}


def check_estimator(name: str) -> None:
    """Raises ConfigError unless keys may use the estimator of this name."""
    try:
        estimators.check(name)
    except ValueError as error:
        raise ConfigError(f"quantizer.estimator = {name}: {error}") from None
