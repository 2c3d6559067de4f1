"""What both blocks share: from queries, keys and values to what the heads read.

Axes:   B batch  H heads  Hkv key heads  T length  K key width  V value width  S codes  M window
Queries and keys are normed per head and divided by τ = K^(1/4), so ‖q‖² = ‖k‖² = √K: q·k already holds the usual
K^(-1/2), and no other scale follows. The codebook lives in that space.  [Lingle 2309.16354]
With `qk_norm: false` they are divided by τ without the norm, the softmax attention of most pretrained models.

A layer whose keys are not quantized (`kind: none`, or a quantizer before its start_step) keeps every key and value:
    cache: true    full softmax attention; the state grows with the text
    cache: false   only distances 0..M; the same machinery as for codes, with a constant state
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from transformer_vq.config import TransformerVQConfig
from transformer_vq.models.conv import ShortConvolution
from transformer_vq.models.norm import RMSNorm, rms_normalize
from transformer_vq.models.positions import POSITIONS
from transformer_vq.models.split import Line, attention_before, inputs_before
from transformer_vq.ops import vq_attention
from transformer_vq.ops.attention import AttentionState, FullState, full_attention
from transformer_vq.ops.attention.arguments import Arguments
from transformer_vq.quantizers import Quantized, Quantizer, build_quantizer
from transformer_vq.quantizers.seeds import seeded

LayerState = AttentionState | FullState


class Carried(NamedTuple):
    """What one layer carries from call to call."""

    attention: LayerState | None
    """None before the first call."""
    inputs: Tensor | None
    """(B, conv-1, D): the last inputs of the short convolution; None before the first call and without one."""


class Context(NamedTuple):
    """What a call says about its tokens, the same for every layer."""

    segments: Tensor | None
    """(B, T) or None."""
    mask: Tensor | None
    """(B, T) or None."""
    draws: Tensor | None
    """(B,) int64, what the dropout that lasts a sequence follows from; None where there is none."""
    places: Tensor
    """(B, T) int64: of each real token in its document."""
    tokens: Tensor | None = None
    """(B, T) int64, what the dropout of entries follows from; None where there is none."""
    line: Line | None = None
    """The processes that share the rows; None: this one has whole rows."""


class VQAttention(nn.Module):
    """Attention over quantized keys, with the layer's own quantizer and positions; blocks add the projections."""

    quantizer: Quantizer
    norm: RMSNorm
    """On the residual stream, in front of the projections."""

    def __init__(self, config: TransformerVQConfig, layer: int, seed: int, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        settings = config.layer_quantizers()[layer]
        self.kind = settings.kind
        self.quantizer = build_quantizer(settings, config.key_value_heads, config.key_dim, seed=seed, layer=layer)
        self.position = POSITIONS[config.position](config, layer, generator)
        own = seeded(seed, layer, "conv")  # not `generator`: all other weights are those of the model without it
        self.conv = ShortConvolution(config.width, config.conv, own) if config.conv else None

    @property
    def keeps_every_key(self) -> bool:
        """True when the layer does full attention now, so that its state grows with the text."""
        return self.config.cache and not self.quantizes

    @property
    def quantizes(self) -> bool:
        """False for `kind: none` and, while it warms up, for a quantizer with a start_step."""
        return self.kind != "none" and not self.quantizer.warming_up

    @property
    def exact_window(self) -> bool:
        """Keys inside the window are seen as they are; beyond it through their codes."""
        return self.quantizes and self.config.window_keys == "exact"

    def mix(self, y: Tensor, context: Context, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """y (B, T, D), the normed input -> what projections read, and the inputs to carry on (`Carried.inputs`)."""
        if self.conv is None:
            return y, None
        if context.line is not None:
            y, before = inputs_before(context.line, y, self.conv.reach, before, context.mask)
        mixed: tuple[Tensor, Tensor] = self.conv(y, before, context.places, context.mask)
        return mixed

    def split_heads(self, x: Tensor, heads: int) -> Tensor:
        """(B, T, heads·width), head-major -> (B, heads, T, width)."""
        return rearrange(x, "b t (h d) -> b h t d", h=heads)

    def key_heads(self, x: Tensor, heads: int) -> Tensor:
        """(B, T, heads·K) -> (B, heads, T, K), the space of queries, keys and codes: see the top."""
        x, scale = self.split_heads(x, heads), self.config.key_dim**-0.25
        return rms_normalize(x, scale, self.config.norm_eps) if self.config.qk_norm else x * scale

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context, state: LayerState | None
    ) -> tuple[Tensor, LayerState, Quantized]:
        """q (B, H, T, K), k (B, Hkv, T, K), v (B, Hkv, T, V) -> heads side by side (B, T, H·V), new state, Quantized.

        A state of the other kind (kept while the quantizer warmed up, say) holds keys that no code stands for: the
        layer then starts empty.
        """
        config = self.config
        quantized: Quantized = self.quantizer(k, context.mask)
        q, bias, rotary = self.position(q, context.draws)
        o: Tensor
        after: LayerState
        if self.keeps_every_key:
            if context.line is not None:
                raise RuntimeError("a layer that keeps every key cannot be cut over processes")
            before = state if isinstance(state, FullState) else None
            o, after = full_attention(
                q,
                k,
                v,
                config.window,
                bias=bias,
                rotary=rotary,
                state=before,
                segments=context.segments,
                mask=context.mask,
            )
        else:
            if self.quantizes:
                k_hat, codes, codebook = quantized.quantized, quantized.codes, self.quantizer.codebook
                k_hat = k if self.exact_window else k_hat
            else:  # a codebook of one row that nobody reads: without a cache only exact keys count
                k_hat, codes = k, torch.zeros(k.shape[:-1], dtype=torch.int64, device=k.device)
                codebook = k.new_zeros(k.shape[1], 1, k.shape[-1])
            arguments: dict[str, Any] = {
                "q": q,
                "k_hat": k_hat,
                "v": v,
                "codes": codes,
                "codebook": codebook,
                "window": config.window,
                "block_len": config.block_length,
                "bias": bias,
                "rotary": rotary,
                "state": state if isinstance(state, AttentionState) else None,
                "cache": config.cache,
                "gradients": config.gradients,
                "exact_window": self.exact_window,
                "grad_through_cache": config.grad_through_cache,
                "backend": config.backend,
                "segments": context.segments,
                "mask": context.mask,
            }
            if context.line is not None:
                arguments = vars(attention_before(context.line, Arguments(**arguments)))
            o, after = vq_attention(**arguments)
        return rearrange(o, "b h t v -> b t (h v)"), after, quantized
