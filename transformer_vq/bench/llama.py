"""The yardsticks of whole models: `transformers`' Llama of our shape, and our own model with full attention.

Both do full attention by PyTorch's fused kernels.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from transformer_vq.config import ConfigError, TransformerVQConfig
from transformer_vq.config.extras import need
from transformer_vq.models import TransformerVQ

LLAMA, FULL = "Llama", "ours, full"
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "vocab_size": 256,
        "layers": 4,
        "width": 192,
        "heads": 4,
        "kv_heads": 1,
        "key_dim": 48,
        "value_dim": 48,
        "window": 128,
        "quantizer": {"kind": "vq", "codes": 128},
    },
    "125M": {
        "vocab_size": 32_000,
        "layers": 12,
        "width": 768,
        "heads": 12,
        "key_dim": 64,
        "value_dim": 64,
        "window": 512,
        "checkpoint_activations": True,
        "quantizer": {"kind": "vq", "codes": 512},
    },
}
"""By name: of the block and positions that Llama has. 125M: checkpointed, so that 131,072 tokens fit 80 GB."""


def shape(name: str) -> dict[str, Any]:
    """One of SHAPES.  Raises ConfigError for another name."""
    if name not in SHAPES:
        raise ConfigError(f"--shape {name}: must be one of {', '.join(SHAPES)}")
    return {"block": "transformer", "position": "rotary", **SHAPES[name]}


def ours(name: str = "small", **changes: Any) -> TransformerVQ:
    """A model of that shape with quantized keys, fresh weights."""
    return TransformerVQ(TransformerVQConfig(**shape(name) | changes))


def full(config: TransformerVQConfig) -> TransformerVQ:
    """The same model whose layers keep every key, fresh weights."""
    plain = {"quantizer": {"kind": "none"}, "per_layer": {}}
    return TransformerVQ(TransformerVQConfig(**config.model_dump(exclude={"quantizer", "per_layer"}) | plain))


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
        "tie_word_embeddings": config.tied_embedding,
        "attn_implementation": "sdpa",
    }
    model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    if config.checkpoint_activations:
        newer, older = "activation_checkpointing_enable", "gradient_checkpointing_enable"
        getattr(model, newer if hasattr(model, newer) else older)()
    return model
