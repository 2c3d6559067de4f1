"""What a configuration is said to cost, against the model itself."""

from __future__ import annotations

import pytest
import torch

from transformer_vq import TransformerVQ, TransformerVQConfig
from transformer_vq.models.describe import describe

SMALL = {
    "vocab_size": 50,
    "layers": 3,
    "width": 12,
    "heads": 4,
    "kv_heads": 2,
    "key_dim": 4,
    "value_dim": 6,
    "window": 5,
}
CASES = {
    "vq": {"quantizer": {"codes": 9}},
    "fsq": {"quantizer": {"kind": "fsq", "levels": [3, 2]}},
    "full": {"quantizer": {"kind": "none"}},
    "window-only": {"quantizer": {"kind": "none"}, "cache": False},
    "mixed": {"quantizer": {"codes": 9}, "per_layer": {"1": {"kind": "none"}}, "block": "transformer"},
    "tied": {"quantizer": {"codes": 9}, "tied_embedding": True, "position": "rotary"},
}


@pytest.mark.parametrize("case", CASES)
def test_parameters_and_state_are_those_of_the_model(case):
    config = TransformerVQConfig(**SMALL, **CASES[case])
    model, length = TransformerVQ(config).eval(), 11
    found = describe(config, length)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        states = model(torch.zeros(1, length, dtype=torch.int64)).state.layers
    for layer, state in zip(found["layers"], states, strict=True):
        assert layer["state_numbers"] == sum(x.numel() for x in state)
        assert layer["state_bytes"] == sum(x.numel() * x.element_size() for x in state)
    assert [layer["state_grows"] for layer in found["layers"]] == [layer.keeps_every_key for layer in model.layers]


def test_flops_of_one_configuration_counted_by_hand():
    config = TransformerVQConfig(
        vocab_size=50, layers=1, width=12, heads=4, kv_heads=2, key_dim=4, value_dim=6, window=5, quantizer={"codes": 9}
    )
    matrices = 12 * (4 * 4) + 12 * (2 * 4 + 2 * 6 + 4 * 6) + (4 * 6) * 12  # queries; keys, values, gate; out
    lookup, position = 2 * 9 * 4, 4 * 4 * 6
    window, cache = 4 * (4 + 6) * 6, 4 * (4 + 6) * 9
    found = describe(config, 11)
    assert found["layers"][0]["flops_per_token"] == 2 * (matrices + lookup + position + window + cache)
    assert found["flops_per_token"] == found["layers"][0]["flops_per_token"] + 2 * 50 * 12
    full = describe(config.model_copy(update={"per_layer": {"0": {"kind": "none"}}}), 11)
    assert full["layers"][0]["flops_per_token"] == 2 * (matrices + position) + 2 * 4 * (4 + 6) * (11 + 1) // 2


def test_a_warm_up_is_described_as_what_follows_it():
    config = TransformerVQConfig(**SMALL, quantizer={"codes": 9, "start_step": 100})
    assert not describe(config, 11)["state_grows"]


def test_a_large_model_needs_no_memory():
    config = TransformerVQConfig(vocab_size=50_000, layers=2, width=2**17, value_dim=2**18)  # 400 GB of weights
    assert describe(config, 2048)["parameters"] > 1e11
