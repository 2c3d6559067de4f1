"""A present-day transformer block: pre-norm, grouped-query VQ attention, then SwiGLU  [Shazeer 2002.05202].

x + W_o[attention of normed x], then x + W_2[SiLU(W_1 x̃) ⊙ W_3 x̃].  Queries and keys are normed as in the paper's unit,
so that the codebook lives in the same space. With `qk_norm: false` and biases where they have them it is the block of
Llama and Qwen2.  Axes:  B batch  T length  D width  H heads  K key width  V value width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transformer_vq.config import TransformerVQConfig
from transformer_vq.models.attention import Carried, Context, VQAttention
from transformer_vq.models.dropout import ResidualDropout
from transformer_vq.models.init import linear
from transformer_vq.models.linear import mapped
from transformer_vq.models.norm import RMSNorm
from transformer_vq.ops.swiglu import swiglu
from transformer_vq.quantizers import Quantized


class SwiGLU(nn.Module):
    """W_2[SiLU(W_1 x) ⊙ W_3 x]: (..., D) -> (..., D); hidden width `mlp_dim` or 8/3 D up to a multiple of 8."""

    def __init__(self, config: TransformerVQConfig, generator: torch.Generator) -> None:
        super().__init__()
        hidden = config.mlp_dim or -(-8 * config.width // 24) * 8
        self.up_proj = linear(config.width, 2 * hidden, generator, config.mlp_bias)  # W_1 and W_3, one above the other
        self.down_proj = linear(hidden, config.width, generator, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = mapped(self.down_proj, swiglu(mapped(self.up_proj, x)))
        return out


class TransformerBlock(VQAttention):
    """Attention and SwiGLU, each on a norm of the residual stream."""

    def __init__(self, config: TransformerVQConfig, layer: int, seed: int, generator: torch.Generator) -> None:
        super().__init__(config, layer, seed, generator)
        self.widths = (config.key_value_heads * config.key_dim, config.key_value_heads * config.value_dim)
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.q_proj = linear(config.width, config.heads * config.key_dim, generator, config.qkv_bias)
        self.kv_proj = linear(config.width, sum(self.widths), generator, config.qkv_bias)
        self.out_proj = linear(config.heads * config.value_dim, config.width, generator, config.out_bias)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config, generator)
        self.dropout = ResidualDropout(config.dropout_residual, config.dropout_layer, layer)

    def forward(self, x: Tensor, context: Context, carried: Carried) -> tuple[Tensor, Carried, Quantized]:
        """x (B, T, D) -> the same shape, what to carry on, and what the quantizer says."""
        heads, kv_heads = self.config.heads, self.config.key_value_heads
        y, inputs = self.mix(self.norm(x), context, carried.inputs)
        k, v = mapped(self.kv_proj, y).split(self.widths, -1)
        q, k = self.key_heads(mapped(self.q_proj, y), heads), self.key_heads(k, kv_heads)
        o, after, quantized = self.attend(q, k, self.split_heads(v, kv_heads), context, carried.attention)
        x = x + self.dropout(mapped(self.out_proj, o), context.draws, context.tokens)
        x = x + self.dropout(self.mlp(self.mlp_norm(x)), context.draws, context.tokens, place=1)
        return x, Carried(after, inputs), quantized
