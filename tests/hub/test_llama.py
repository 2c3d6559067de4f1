"""The Llama family as our block: logits equal Transformers' own, before anything is quantized."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import assert_same
from torch.nn import functional as F

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from transformer_vq.config import ConfigError, TransformerVQConfig, validate
from transformer_vq.hub.adopt.llama import from_llama, load
from transformer_vq.models import TransformerVQ

SMALL = {
    "vocab_size": 41,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "attn_implementation": "sdpa",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS = {
    "plain": (LlamaForCausalLM, LlamaConfig, {}),
    "grouped, wide heads": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2, "head_dim": 10}),
    "all biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "tied, one key head, eps": (
        LlamaForCausalLM,
        LlamaConfig,
        {"tie_word_embeddings": True, "num_key_value_heads": 1, "rms_norm_eps": 0.01},
    ),
    "base": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    "llama3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}),
    "linear": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}},
    ),
    "yarn": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": YARN, "attention_bias": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 2}),
    "mistral": (MistralForCausalLM, MistralConfig, {"num_key_value_heads": 2, "sliding_window": None}),
}


def drawn(variant="plain", **changes):
    """A model of Transformers whose every weight is random, gains and biases too."""
    model, config, settings = VARIANTS[variant]
    torch.manual_seed(0)
    theirs = model(config(**SMALL | settings | changes)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.1))
    return theirs


def in_fp64(theirs):
    """The same model with angles and norms in fp64: theirs are in fp32, whatever the model's type."""
    theirs, rotation = theirs.double(), theirs.model.rotary_emb
    kind = theirs.config.rope_parameters["rope_type"]
    base, size = theirs.config.rope_parameters["rope_theta"], 2 * len(rotation.inv_freq)
    plain = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    frequencies = plain if kind == "default" else rotation.inv_freq.double()

    def rotate(x, position_ids):
        angle = (position_ids.double()[..., None] * frequencies).repeat(1, 1, 2)
        return angle.cos() * rotation.attention_scaling, angle.sin() * rotation.attention_scaling

    rotation.forward = rotate
    for module in theirs.modules():
        if hasattr(module, "variance_epsilon"):
            shape = module.weight.shape
            module.forward = partial(
                F.rms_norm, normalized_shape=shape, weight=module.weight, eps=module.variance_epsilon
            )
    return theirs


def tokens(T=70):
    return torch.randint(41, (2, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_equal_transformers(variant):
    theirs, x = drawn(variant), tokens()
    ours = from_llama(theirs)
    assert_same({"logits": ours(x).logits}, {"logits": theirs(x).logits}, rtol=1e-5)
    wide = in_fp64(drawn(variant))
    assert_same({"logits": from_llama(wide)(x).logits}, {"logits": wide(x).logits}, rtol=1e-11)


@pytest.mark.parametrize("variant", ["all biases", "llama3", "tied, one key head, eps"])
def test_gradients_equal_transformers(variant):
    theirs, x = in_fp64(drawn(variant)), tokens()
    ours = from_llama(theirs)
    ours(x, labels=x).loss.backward()
    F.cross_entropy(theirs(x).logits.flatten(0, 1), x.flatten()).backward()
    for i, layer in enumerate(theirs.model.layers):
        mine = ours.layers[i]
        got = {"q": mine.q_proj.weight.grad, "kv": mine.kv_proj.weight.grad, "up": mine.mlp.up_proj.weight.grad}
        attention, mlp = layer.self_attn, layer.mlp
        want = {
            "q": attention.q_proj.weight.grad,
            "kv": torch.cat([attention.k_proj.weight.grad, attention.v_proj.weight.grad]),
            "up": torch.cat([mlp.gate_proj.weight.grad, mlp.up_proj.weight.grad]),
        }
        assert_same(got, want, rtol=1e-10)
    assert_same(
        {"embedding": ours.embedding.weight.grad}, {"embedding": theirs.model.embed_tokens.weight.grad}, rtol=1e-10
    )


@pytest.mark.parametrize("backend", ["auto", "blockwise", "recurrent"])
@torch.no_grad()
def test_a_window_as_long_as_the_text_changes_nothing(backend):
    """Quantizers in every layer, their codebooks random: inside the window keys are exact."""
    theirs, x = in_fp64(drawn("grouped, wide heads")), tokens(40)
    full = from_llama(theirs)
    changes = {"quantizer": {"kind": "vq", "codes": 5}, "window_keys": "exact", "window": 39, "backend": backend}
    ours = TransformerVQ(validate({**full.config.model_dump(), **changes}, TransformerVQConfig)).double().eval()
    ours.load_state_dict(full.state_dict(), strict=False)
    assert_same({"logits": ours(x).logits}, {"logits": theirs(x).logits}, rtol=1e-11)
    piece, state = [], None
    for part in x.split([7, 1, 20, 12], 1):
        out = ours(part, state=state)
        state = out.state
        piece.append(out.logits)
    assert_same({"logits": torch.cat(piece, 1)}, {"logits": theirs(x).logits}, rtol=1e-11)


@torch.no_grad()
def test_a_folder_in_sixteen_bits_is_read_exactly(tmp_path):
    written = drawn("llama3").bfloat16()
    written.save_pretrained(tmp_path)
    theirs, x = load(str(tmp_path)), tokens()
    ours = from_llama(theirs)
    assert ours.layers[0].q_proj.weight.dtype == torch.float32
    assert torch.equal(ours.layers[1].mlp.down_proj.weight, written.model.layers[1].mlp.down_proj.weight.float())
    assert_same({"logits": ours(x).logits}, {"logits": theirs(x).logits}, rtol=1e-5)
    narrow = from_llama(written)  # frequencies are not rounded with the weights
    assert narrow.config == ours.config and narrow(x).logits.isfinite().all()


REFUSED = {
    "sliding_window = 16": ("mistral", {"sliding_window": 16}),
    "rope_type = dynamic: adopt knows default, linear, llama3, yarn": (
        "plain",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}},
    ),
    "hidden_act = gelu: adopt knows silu": ("plain", {"hidden_act": "gelu"}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_our_block_is_refused(message):
    variant, changes = REFUSED[message]
    with pytest.raises(ConfigError, match=message):
        from_llama(drawn(variant, **changes))


def test_unknown_weights_are_named():
    theirs = drawn()
    theirs.model.layers[1].self_attn.q_norm = torch.nn.LayerNorm(6, bias=False)
    with pytest.raises(ConfigError, match=r"does not know what to do with: model.layers.1.self_attn.q_norm.weight"):
        from_llama(theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_frequencies": [1.0]}, "rotary_frequencies: needs position: rotary, not xl"),
        (
            {"rotary_frequencies": [1.0], "position": "rotary"},
            "rotary_frequencies: has 1 numbers; key_dim/2 = 32 it is",
        ),
        ({"window_keys": "exact", "gradients": "block"}, "window_keys = exact: needs gradients: window"),
        ({"qkv_bias": True}, "qkv_bias = true: needs block: transformer"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        validate(change, TransformerVQConfig)
