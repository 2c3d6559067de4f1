"""The Llama family as our transformer block: settings and weights, nothing trained.

With `kind: none` in every layer the result computes what Transformers' own class does, to rounding: the same norms,
projections, rotation and SwiGLU (tests/hub/test_llama.py). Biases are those that the weights have.

    theirs                                    ours
    q_proj                                    q_proj, with `qk_norm: false`
    k_proj, v_proj, one above the other       kv_proj
    gate_proj, up_proj, one above the other   mlp.up_proj
    rope_parameters                           position_base, or rotary_frequencies where they are scaled
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

from transformer_vq.config import ConfigError, TransformerVQConfig, validate
from transformer_vq.models import TransformerVQ
from transformer_vq.models.transformer import TransformerBlock

KNOWN = {"llama": "Llama", "mistral": "Mistral without a sliding window", "qwen2": "Qwen2 without a sliding window"}
"""Model types whose block is ours, and what of them."""
SCALINGS = ("default", "linear", "llama3", "yarn")
"""Rotary scalings whose frequencies stay what they are however long the text."""
PLAIN = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
LAYER = {
    "input_layernorm": ("norm", 0),
    "self_attn.q_proj": ("q_proj", 0),
    "self_attn.k_proj": ("kv_proj", 0),
    "self_attn.v_proj": ("kv_proj", 1),
    "self_attn.o_proj": ("out_proj", 0),
    "post_attention_layernorm": ("mlp_norm", 0),
    "mlp.gate_proj": ("mlp.up_proj", 0),
    "mlp.up_proj": ("mlp.up_proj", 1),
    "mlp.down_proj": ("mlp.down_proj", 0),
}
"""Module of theirs -> module of ours, and its place where several of theirs are one."""


def load(name: str) -> Any:
    """The model of a folder or of a name on the hub, in fp32 and evaluation mode; its code is transformers' own.

    Raises ConfigError, one line, for a model that is not found or not known; before weights are read, if it can be.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # no such name, no network, no access, a type that transformers does not know
        raise ConfigError(f"{name}: no model that transformers can read: {_first_line(error)}") from None
    check(config, name)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(f"{name}: its weights cannot be read: {_first_line(error)}") from None
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.eval()


def check(config: PreTrainedConfig, name: str) -> None:
    """Raise ConfigError unless a model with this config is one that `adopt` knows."""
    if config.model_type not in KNOWN:
        known = ", ".join(f"{kind} ({what})" for kind, what in KNOWN.items())
        raise ConfigError(f"{name}: is of type {config.model_type}, which adopt does not know; it knows {known}")
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        raise ConfigError(f"{name}: sliding_window = {window}: adopt knows attention over the whole text alone")
    if (act := config.hidden_act) not in ("silu", "swish"):
        raise ConfigError(f"{name}: hidden_act = {act}: adopt knows silu")
    rope = config.rope_parameters or {}
    if (kind := rope.get("rope_type", "default")) not in SCALINGS:
        raise ConfigError(f"{name}: rope_type = {kind}: adopt knows {', '.join(SCALINGS)}")
    if (part := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError(f"{name}: partial_rotary_factor = {part}: adopt knows heads that are rotated whole")
    if getattr(config, "quantization_config", None):
        raise ConfigError(f"{name}: its weights are quantized; adopt takes those in 16 bits or more")


def settings(theirs: Any) -> dict[str, Any]:
    """What the weights fix of `model:`; all layers keep every key."""
    config, state = theirs.config, theirs.state_dict()
    scaled = config.rope_parameters.get("rope_type", "default") != "default"
    width = config.hidden_size // config.num_attention_heads
    head = getattr(config, "head_dim", None) or width
    return {
        "vocab_size": config.vocab_size,
        "block": "transformer",
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "key_dim": head,
        "value_dim": head,
        "mlp_dim": config.intermediate_size,
        "position": "rotary",
        "position_base": float(config.rope_parameters["rope_theta"]),
        "rotary_frequencies": rotation(theirs).inv_freq.double().tolist() if scaled else None,
        "tied_embedding": bool(config.tie_word_embeddings),
        "norm_eps": float(config.rms_norm_eps),
        "qk_norm": False,
        "qkv_bias": "model.layers.0.self_attn.q_proj.bias" in state,
        "out_bias": "model.layers.0.self_attn.o_proj.bias" in state,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in state,
        "quantizer": {"kind": "none"},
    }


def from_llama(theirs: Any, name: str = "the model") -> TransformerVQ:
    """Our model with their weights, in their dtype, evaluation mode and full attention.

    Raises ConfigError for a model that `check` refuses, and for tensors whose meaning is not known.
    """
    check(theirs.config, name)
    given = settings(theirs)
    ours = TransformerVQ(validate(given, TransformerVQConfig)).to(next(theirs.parameters()).dtype).eval()
    weights, unknown = renamed(theirs.state_dict(), given["tied_embedding"])
    expected = ours.state_dict()
    left = [key for key in expected if key not in weights and not _stays_zero(key)]
    wrong = [key for key, x in weights.items() if key not in expected or expected[key].shape != x.shape]
    if unknown or left or wrong:
        names = ", ".join([*unknown, *left, *wrong][:3])
        raise ConfigError(f"{name}: has weights that adopt does not know what to do with: {names}")
    scaling = float(rotation(theirs).attention_scaling)
    with torch.no_grad():
        for key, tensor in expected.items():
            tensor.copy_(weights[key]) if key in weights else tensor.zero_()
        if not math.isclose(scaling, 1.0):  # of yarn: queries and keys are multiplied by it after they are rotated
            keys = given["kv_heads"] * given["key_dim"]
            for layer in cast(Iterable[TransformerBlock], ours.layers):
                for row in (*layer.q_proj.parameters(), *(p[:keys] for p in layer.kv_proj.parameters())):
                    row.mul_(scaling)
    return ours


def rotation(theirs: Any) -> Any:
    """Their rotary embedding made anew: a model that was cast to 16 bits has rounded its frequencies."""
    return type(theirs.model.rotary_emb)(config=theirs.config)


def renamed(state: Mapping[str, Tensor], tied: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Their tensors under our names, those that are one with us joined; and the names that mean nothing here."""
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    unknown = []
    for key, tensor in state.items():
        if key in PLAIN:
            if not (tied and key == "lm_head.weight"):
                found[PLAIN[key]] = tensor
            continue
        module, _, kind = key.rpartition(".")
        prefix, layer, inner = (
            (*module.split(".", 3), "", "", "", "")[1:4] if module.startswith("model.layers.") else ("",) * 3
        )
        if prefix != "layers" or inner not in LAYER:
            unknown.append(key)
            continue
        ours, place = LAYER[inner]
        parts.setdefault(f"layers.{layer}.{ours}.{kind}", {})[place] = tensor
    found |= {key: torch.cat([tensors[i] for i in sorted(tensors)]) for key, tensors in parts.items()}
    return found, unknown


def _stays_zero(key: str) -> bool:
    """Biases that they do not have: of the norms and of the head."""
    return key.endswith(("norm.bias", "head.bias", "head_bias"))


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
