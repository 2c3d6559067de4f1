"""What is read off a model, compared with the model's own tensors and with sums over all pairs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from models_for_evaluation import tiny_model

from transformer_vq import TransformerVQ, TransformerVQConfig
from transformer_vq.inspect.reading import read
from transformer_vq.models.attention import VQAttention
from transformer_vq.ops.nearest import lookup

PARTS = ("itself", "window", "beyond")
TEXT = np.random.default_rng(0).integers(97, 105, 41).astype(np.uint8)
SETTINGS = {
    "vq": {"kind": "vq"},
    "one code": {"quantizer": {"kind": "vq", "codes": 1}},
    "fsq": {"kind": "fsq"},
    "simvq": {"quantizer": {"kind": "simvq", "codes": 5}},
    "lfq": {"quantizer": {"kind": "lfq", "bits": 3}},
    "bsq": {"quantizer": {"kind": "bsq", "bits": 3}},
    "full": {"kind": "none"},
    "window only": {"kind": "none", "cache": False},
    "no cache": {"kind": "vq", "cache": False},
    "not started": {"quantizer": {"kind": "vq", "codes": 4, "start_step": 5}},
    "transformer": {"kind": "vq", "block": "transformer", "heads": 4, "kv_heads": 2, "position": "rotary"},
    "full rotary": {"kind": "none", "position": "rotary", "kv_heads": 1},
    "scalar": {"kind": "vq", "position": "scalar", "kv_heads": 1},
    "none": {"kind": "vq", "position": "none", "conv": 3},
    "mixed": {"kind": "vq", "per_layer": {"1": {"kind": "none"}}},
}  # fmt: skip


def model_of(name: str) -> TransformerVQ:
    settings = dict(SETTINGS[name])
    kind = settings.pop("kind", "vq")
    quantizer = settings.pop("quantizer", None)
    return tiny_model(kind, **settings) if quantizer is None else of_quantizer(quantizer, settings)


def of_quantizer(quantizer: dict, settings: dict) -> TransformerVQ:
    shape = {"layers": 2, "width": 16, "heads": 2, "key_dim": 4, "value_dim": 8, "window": 4, "block_len": 4}
    config = TransformerVQConfig(vocab_size=256, quantizer=quantizer, **{**shape, **settings})
    return TransformerVQ(config, seed=1).double().eval()


def pairs(model: TransformerVQ, tokens: np.ndarray, documents: np.ndarray | None, i: int) -> torch.Tensor:
    """Attention of layer i by pairs (H, N, N): the layer's own output when value j is the j-th unit vector.

    The whole text in one call: nothing is carried, nothing measured in pieces.
    """
    N, row = len(tokens), torch.from_numpy(tokens.astype(np.int64))[None]
    places = None if documents is None else torch.from_numpy(np.searchsorted(documents, np.arange(N), "right"))[None]
    layer, seen = model.layers[i], {}
    plain = VQAttention.attend

    def attend(q, k, v, context, state):
        eye = torch.eye(N, dtype=v.dtype).expand(1, k.shape[1], N, N)
        seen["p"] = plain(layer, q, k, eye, context, None)[0].unflatten(-1, (-1, N)).transpose(1, 2)[0]
        return plain(layer, q, k, v, context, state)

    layer.attend = attend
    with torch.no_grad():
        model.features(row, segments=places)
    del layer.attend
    return seen["p"]


@pytest.mark.parametrize(
    ("name", "documents"),
    [*((name, None) for name in SETTINGS), *((name, np.array([0, 9, 30])) for name in ("vq", "full", "full rotary"))],
    ids=lambda x: x if isinstance(x, str) else "one" if x is None else "three documents",
)
def test_attention_equals_the_layers_own(name, documents):
    """Shares by stretch, and by code, against the probabilities of every pair in a single call."""
    model = model_of(name)
    found = read(model, TEXT, [0, 1], documents, piece=7)
    distance = np.arange(len(TEXT))[:, None] - np.arange(len(TEXT))
    window = model.config.window
    classes = (distance == 0, (distance > 0) & (distance <= window), distance > window)
    for i, reading in found.items():
        p = pairs(model, TEXT, documents, i).numpy()
        bins = len(reading.edges) - 1
        assert reading.shares.shape == (3, model.config.heads, bins)
        for share, chosen in zip(reading.shares, classes, strict=True):
            by_token = (p * chosen).sum(-1)
            want = np.stack([by_token[:, a:b].sum(-1) for a, b in itertools.pairwise(reading.edges)], -1)
            np.testing.assert_allclose(share, want, atol=1e-9)
        np.testing.assert_allclose(reading.shares.sum((0, 2)), len(TEXT), rtol=1e-12)
        if reading.layer.quantizes and model.config.cache:
            group = model.config.heads // model.config.key_value_heads
            for h, codes in enumerate(reading.codes):
                far = (p[h * group : (h + 1) * group] * classes[2]).sum((0, 1))
                want = np.bincount(codes, weights=far, minlength=reading.codebook.shape[1])
                np.testing.assert_allclose(reading.by_code[h], want, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in SETTINGS if "full" not in name and name != "window only"])
def test_codes_and_angles_are_those_of_the_quantizer(name):
    model, given = model_of(name), {}

    def listen(quantizer, inputs, result):
        given[0] = inputs[0], result.codes

    model.quantizers[0].register_forward_hook(listen)
    reading = read(model, TEXT, [0], piece=100)[0]
    k, codes = given[0]
    assert np.array_equal(reading.codes, codes[0].numpy())
    rows = lookup(model.quantizers[0].codebook, codes)[0]
    cosine = torch.nn.functional.cosine_similarity(k[0], rows, dim=-1)
    zero = (rows == 0).all(-1).numpy()  # the middle code of odd levels: no direction, and rotation leaves it alone
    assert np.array_equal(np.isnan(reading.angle), zero) and (reading.ratio[zero] == 1).all()
    np.testing.assert_allclose(np.cos(reading.angle)[~zero], cosine.detach().numpy()[~zero], atol=1e-5)
    ratio = (rows.norm(dim=-1) / k[0].norm(dim=-1)).detach().numpy()
    np.testing.assert_allclose(reading.ratio[~zero], ratio[~zero], rtol=1e-5)
    np.testing.assert_allclose(reading.gram[0], (k[0, 0].T @ k[0, 0]).detach().numpy(), rtol=1e-9, atol=1e-12)
    assert len(reading.sampled) == len(TEXT)
    np.testing.assert_allclose(reading.keys, k[0].detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("name", ["vq", "full", "not started", "none"])
def test_does_not_depend_on_the_pieces(name):
    model = model_of(name)
    one, other = (read(model, TEXT, [1], piece=piece)[1] for piece in (1, 41))
    assert np.array_equal(one.codes, other.codes)
    for field in ("shares", "by_code", "gram", "keys"):
        np.testing.assert_allclose(getattr(one, field), getattr(other, field), atol=1e-9)


def test_a_single_token_and_none():
    reading = read(model_of("vq"), TEXT[:1], [0])[0]
    assert reading.shares[0].sum() == pytest.approx(2) and reading.shares[1:].sum() == 0 and len(reading.edges) == 2
    with pytest.raises(ValueError, match="without tokens"):
        read(model_of("vq"), TEXT[:0], [0])


def test_the_model_is_left_as_it_was():
    model = model_of("vq").train()
    read(model, TEXT, [0])
    assert model.training and not any(m._forward_hooks for m in model.modules())
