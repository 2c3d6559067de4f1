"""Small models and splits that the tests of evaluation and of the console share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from transformer_vq import TransformerVQ, TransformerVQConfig
from transformer_vq.data import TokenFile
from transformer_vq.data.tokenizers import ByteTokenizer


def tiny_model(kind: str = "vq", **settings: Any) -> TransformerVQ:
    """Two layers in fp64, whose codebook and window are short enough for a test's text to outgrow them."""
    quantizer = {"vq": {"kind": "vq", "codes": 8}, "none": {"kind": "none"}, "fsq": {"kind": "fsq", "levels": [3, 3]}}[
        kind
    ]
    shape = {"layers": 2, "width": 16, "heads": 2, "key_dim": 4, "value_dim": 8, "window": 4, "block_len": 4}
    config = TransformerVQConfig(vocab_size=256, quantizer=quantizer, **{**shape, **settings})
    return TransformerVQ(config, seed=1).to(torch.float64).eval()


def tiny_split(length: int = 60, documents: tuple[int, ...] = (0, 20, 37), words: int | None = None) -> TokenFile:
    """Random letters, a space now and then."""
    letters = np.random.default_rng(0).integers(97, 105, length).astype(np.uint8)
    letters[::6] = 32
    words = length // 6 if words is None else words
    return TokenFile("valid", letters, np.array(documents), length, words, ByteTokenizer())
