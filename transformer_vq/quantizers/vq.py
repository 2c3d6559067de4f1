"""Vector quantization: the nearest row of a codebook learned by moving averages or by gradient.

    codebook = ema_sum / max(ema_count, 0.01)          after an optimizer step, with γ the setting `ema`:
    ema_sum ← γ·ema_sum + (1−γ)·Σ_{t: z_t=s} k_t       ema_count ← γ·ema_count + (1−γ)·#{t: z_t=s}    [Lingle 2309.16354]

Axes:  B batch  H heads  T length  K key width  S codes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transformer_vq.config.quantizer import VQConfig
from transformer_vq.ops import estimators
from transformer_vq.ops.nearest import lookup, nearest_code
from transformer_vq.quantizers.base import Quantized
from transformer_vq.quantizers.health import batch_health, code_counts, running_health
from transformer_vq.quantizers.losses import commitment, squared_distance
from transformer_vq.quantizers.scheduled import ScheduledQuantizer
from transformer_vq.quantizers.seeds import seeded
from transformer_vq.quantizers.statistics import Statistics, add_over_processes

COUNT_FLOOR = 0.01  # the reference's: a code that is never used keeps a finite row


class VectorQuantizer(ScheduledQuantizer):
    """Keys in; codes, quantized keys and the commitment loss out. Owns the codebook; the arithmetic is in ops/."""

    config: VQConfig
    ema_sum: Tensor
    ema_count: Tensor

    def __init__(self, config: VQConfig, heads: int, dim: int, seed: int = 0, layer: int = 0) -> None:
        super().__init__(config, seed, layer, started=config.init == "normal")
        H, S = heads, config.size
        rows = torch.randn(H, S, dim, generator=seeded(seed, layer, "codebook")) * (H * S) ** -0.5
        self.register_buffer("ema_sum", rows)
        self.register_buffer("ema_count", torch.ones(H, S))
        self.statistics = Statistics()

    @property
    def codebook(self) -> Tensor:
        """(H, S, K), fp32 or wider."""
        return self.ema_sum / self.ema_count.clamp_min(COUNT_FLOOR)[..., None]

    def forward(self, k: Tensor, mask: Tensor | None = None) -> Quantized:
        """k (B, H, T, K); mask (B, T), True where a token is real."""
        self.start_if_due(k, mask)
        codebook = self.codebook
        codes = nearest_code(k, codebook, self.config.lookup)
        nearest = lookup(codebook.to(k.dtype), codes)
        distance = squared_distance(k, nearest)
        loss = commitment(distance, mask)
        counts = code_counts(codes, self.config.size, mask)
        if self.training and not self.warming_up:
            self.statistics.collect(k, codes, counts, mask, self.ema_sum.dtype)
        metrics = batch_health(k, nearest, distance.detach(), counts, mask) | running_health(self.ema_count, 1.0)
        if self.warming_up:
            return Quantized(codes, k, loss.detach() * 0, loss.detach(), metrics)
        quantized = estimators.apply(self.config.estimator, k, nearest, codebook, codes)
        return Quantized(codes, quantized, self.beta * loss, loss, metrics)

    def pending(self) -> tuple[Tensor, Tensor]:
        """What this process collected since the last application: sum (H, S, K) and count (H, S)."""
        return self.statistics.pending(self.ema_sum)

    def ema_target(self, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """What `ema_sum` and `ema_count` become for a step's sums: γ·old + (1−γ)·new."""
        keep = self.config.ema
        return keep * self.ema_sum + (1 - keep) * total, keep * self.ema_count + (1 - keep) * count

    @torch.no_grad()
    def apply_codebook_statistics(self) -> None:
        """Move the codebook by what all processes collected; nothing moves when none collected anything."""
        total, count = self.pending()
        add_over_processes(total, count)
        if count.any():
            new_sum, new_count = self.ema_target(total, count)
            self.ema_sum.copy_(new_sum)
            self.ema_count.copy_(new_count)
        self.statistics.discard()

    def discard_codebook_statistics(self) -> None:
        """Forget what was collected, for a step that is skipped."""
        self.statistics.discard()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Keep the statistics at fp32 or wider when the model is cast to a narrower type."""
        statistics = {id(self.ema_sum), id(self.ema_count)}

        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrow = moved.is_floating_point() and torch.finfo(moved.dtype).bits < 32
            return tensor.to(moved.device) if narrow and id(tensor) in statistics else moved

        return super()._apply(keep_wide, recurse)
