"""The yardstick of whole models: `transformers`' Llama of our shape, full attention by PyTorch's fused kernels."""

from __future__ import annotations

from typing import Any

from torch import nn

from transformer_vq.config import TransformerVQConfig
from transformer_vq.config.extras import need
from transformer_vq.models import TransformerVQ

SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "block": "transformer",
    "position": "rotary",
    "layers": 4,
    "width": 192,
    "heads": 4,
    "kv_heads": 1,
    "key_dim": 48,
    "value_dim": 48,
    "window": 128,
    "quantizer": {"kind": "vq", "codes": 128},
}


def ours(**changes: Any) -> TransformerVQ:
    """A model of SHAPE with quantized keys, fresh weights."""
    return TransformerVQ(TransformerVQConfig(**SHAPE | changes))


def llama(config: TransformerVQConfig) -> nn.Module:
    """Layers, widths, heads and SwiGLU of `config`, fresh weights.  Raises ConfigError without transformers."""
    transformers = need("transformers", "bench: Llama")
    hidden = config.mlp_dim or -(-8 * config.width // 24) * 8
    sizes: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.key_dim,
        "max_position_embeddings": 1 << 20,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "attn_implementation": "sdpa",
    }
    model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    return model
