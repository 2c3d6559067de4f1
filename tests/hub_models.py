"""Small models under Transformers' names, and texts for them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
from transformer_vq.hub import TransformerVQForCausalLM, TransformerVQHubConfig

SIZES = {"layers": 2, "width": 16, "key_dim": 8, "value_dim": 8, "window": 3, "block_len": 4}
VARIANTS = {
    "gau": {"quantizer": {"kind": "vq", "codes": 8, "estimator": "rotation"}},
    "tied": {"tied_embedding": True, "logit_scale": 0.5, "quantizer": {"kind": "vq", "codes": 8}},
    "transformer": {"block": "transformer", "heads": 4, "kv_heads": 2, "position": "rotary", "conv": 3},
    "fsq-and-full": {"per_layer": {"0": {"kind": "fsq", "levels": [3, 3]}, "1": {"kind": "none"}}},
    "window-only": {"cache": False, "absolute_positions": True, "position": "scalar"},
}
EACH = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
VOCAB = 29


def config(**changes) -> TransformerVQHubConfig:
    return TransformerVQHubConfig(model={**SIZES, **changes}, vocab_size=VOCAB, seed=3)


def model(**changes) -> TransformerVQForCausalLM:
    return TransformerVQForCausalLM(config(**changes)).eval()


def text(B: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))
