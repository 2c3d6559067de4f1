"""Settings in an exported folder answer what ours answer: what is added to the one must be added to the other."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from transformer_vq.config import TransformerVQConfig, model
from transformer_vq.hub import plain

SETTINGS = [
    {},
    {"gradients": "block", "block_len": "auto"},
    {"block_len": 16, "block": "transformer", "heads": 4, "kv_heads": 2},
    {"per_layer": {"0": {"kind": "fsq", "levels": [3, 3]}, "1": {"kind": "none"}, "2": {"kind": "bsq", "bits": 3}}},
    {"cache": False, "quantizer": {"kind": "none"}},
]


def own_properties(kind: type) -> set[str]:
    """Names of the properties that our own class defines."""
    return {
        name
        for base in kind.__mro__
        if issubclass(base, BaseModel) and base.__module__.startswith("transformer_vq")
        for name, value in vars(base).items()
        if isinstance(value, property)
    }


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_every_property_has_the_same_value(changes):
    ours = TransformerVQConfig(vocab_size=256, **changes).resolved()
    theirs = plain.TransformerVQConfig(**ours.model_dump(mode="json"))
    names = own_properties(TransformerVQConfig)
    assert {"key_value_heads", "block_length", "full_attention"} <= names
    for name in names:
        assert getattr(theirs, name) == getattr(ours, name), name
    assert plain.PAPER_BLOCK == model.PAPER_BLOCK
    for mine, other in zip(ours.layer_quantizers(), theirs.layer_quantizers(), strict=True):
        assert type(mine).__name__ == type(other).__name__
        for name in own_properties(type(mine)):
            assert getattr(other, name) == getattr(mine, name), name
