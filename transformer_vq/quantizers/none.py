"""No quantization: the keys themselves, for the full-attention baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from transformer_vq.config.quantizer import NoneConfig
from transformer_vq.ops.numerics import wide_dtype
from transformer_vq.quantizers.base import Quantized, Quantizer


class NoQuantizer(Quantizer):
    """Keys pass as they are; there are no codes."""

    _codebook: Tensor

    def __init__(self, config: NoneConfig, heads: int, dim: int, seed: int = 0, layer: int = 0) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("_codebook", torch.empty(heads, 0, dim), persistent=False)

    @property
    def codebook(self) -> Tensor:
        """(H, 0, K)."""
        return self._codebook

    def find(self, k: Tensor) -> Tensor:
        """(B, H, 0)."""
        return k.new_empty(*k.shape[:2], 0, dtype=torch.int64)

    def forward(self, k: Tensor, mask: Tensor | None = None) -> Quantized:
        """k (B, H, T, K) -> codes (B, H, 0), the keys, and no loss."""
        zero = torch.zeros((), dtype=wide_dtype(k), device=k.device)
        return Quantized(self.find(k), k, zero, zero, {})
