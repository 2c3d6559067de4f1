"""The paper's gated attention unit: one sublayer, attention and gate together  [Hua 2202.10447; Lingle 2309.16354].

x + W_res[(attention of normed x) ⊙ SiLU(gate)].  Axes:  B batch  T length  D width  H heads  K key width  V value width
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from transformer_vq.config import TransformerVQConfig
from transformer_vq.models.attention import Carried, Context, VQAttention
from transformer_vq.models.dropout import ResidualDropout
from transformer_vq.models.init import linear
from transformer_vq.models.linear import mapped
from transformer_vq.models.norm import RMSNorm
from transformer_vq.quantizers import Quantized


class GAU(VQAttention):
    """Gated attention unit with any number of heads; key and value heads may be fewer, the gate has all."""

    def __init__(self, config: TransformerVQConfig, layer: int, seed: int, generator: torch.Generator) -> None:
        super().__init__(config, layer, seed, generator)
        self.widths = (
            config.key_value_heads * config.key_dim,
            config.key_value_heads * config.value_dim,
            config.heads * config.value_dim,
        )
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.q_proj = linear(config.width, config.heads * config.key_dim, generator)
        self.kvg_proj = linear(config.width, sum(self.widths), generator)
        self.out_proj = linear(config.heads * config.value_dim, config.width, generator)
        self.dropout = ResidualDropout(config.dropout_residual, config.dropout_layer, layer)

    def forward(self, x: Tensor, context: Context, carried: Carried) -> tuple[Tensor, Carried, Quantized]:
        """x (B, T, D) -> the same shape, what to carry on, and what the quantizer says."""
        heads, kv_heads = self.config.heads, self.config.key_value_heads
        y, inputs = self.mix(self.norm(x), context, carried.inputs)
        k, v, gate = mapped(self.kvg_proj, y).split(self.widths, -1)
        q, k = self.key_heads(mapped(self.q_proj, y), heads), self.key_heads(k, kv_heads)
        v = self.split_heads(F.silu(v), kv_heads)
        o, after, quantized = self.attend(q, k, v, context, carried.attention)
        x = x + self.dropout(mapped(self.out_proj, o * F.silu(gate)), context.draws, context.tokens)
        return x, Carried(after, inputs), quantized
