"""Distributions of codes, compared with NumPy's histograms of all keys; and their pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from transformer_vq.evaluation.figures import draw_histograms, pixels
from transformer_vq.evaluation.histograms import BINS, KeyHistograms, by_rank
from transformer_vq.quantizers import build_quantizer


@pytest.mark.parametrize("masked", [False, True])
def test_equal_numpys_over_all_batches(masked):
    torch.manual_seed(0)
    quantizer = build_quantizer({"kind": "vq", "codes": 5}, 2, 4).eval()
    batches = torch.randn(3, 2, 2, 7, 4) * 3
    mask = torch.rand(3, 2, 7) < 0.6 if masked else None
    with KeyHistograms({"layer3": quantizer}) as heard:
        results = [quantizer(k, *(() if mask is None else (mask[i],))) for i, k in enumerate(batches)]
    quantizer(batches[0])  # outside: not heard
    found = heard.histograms()
    assert set(found) == {"layer3/code_share", "layer3/norm_ratio", "layer3/angle"}
    real = np.ones((3, 2, 2, 7), bool) if mask is None else mask[:, :, None].expand(3, 2, 2, 7).numpy()
    rows, k = torch.stack([r.quantized for r in results]), batches
    ratio = (rows.norm(dim=-1) / k.norm(dim=-1)).clamp(max=2).detach().numpy()[real]
    angle = torch.rad2deg(torch.nn.functional.cosine_similarity(rows, k, dim=-1).acos()).detach().numpy()[real]
    for name, values, end in (("norm_ratio", ratio, 2), ("angle", angle, 180)):
        counts, edges = np.histogram(values, bins=BINS, range=(0, end))
        np.testing.assert_array_equal(found[f"layer3/{name}"].counts, counts)
        np.testing.assert_allclose(found[f"layer3/{name}"].edges, edges)
    codes = torch.stack([r.codes for r in results]).transpose(0, 2).numpy()  # (H, B, batch, T)
    at = np.ones_like(codes, bool) if mask is None else mask.transpose(0, 1)[None].expand(2, -1, -1, -1).numpy()
    shares = [-np.sort(-np.bincount(c[m], minlength=5) / m.sum()) for c, m in zip(codes, at, strict=True)]
    np.testing.assert_allclose(found["layer3/code_share"].counts, np.mean(shares, 0))


def test_many_codes_are_put_together():
    counts = np.random.default_rng(0).integers(0, 9, (1, 1000)).astype(float)
    share, edges = by_rank(counts)
    assert len(share) == 64 and edges[0] == 0 and edges[-1] == 1000 and share.sum() == pytest.approx(1)
    ranked = -np.sort(-counts[0]) / counts.sum()
    np.testing.assert_allclose(share[0], ranked[: int(edges[1])].sum())
    assert by_rank(np.zeros((2, 3))).counts.tolist() == [0, 0, 0]


def test_no_quantizers_nothing_heard_and_no_hooks_left():
    quantizer = build_quantizer({"kind": "fsq", "levels": [3]}, 1, 4)
    with KeyHistograms({}) as heard:
        quantizer(torch.randn(1, 1, 3, 4))
    assert heard.histograms() == {}
    with KeyHistograms({"a": quantizer}):
        assert quantizer._forward_hooks
    assert not quantizer._forward_hooks


def test_the_picture_has_a_line_a_layer():
    quantizer = build_quantizer({"kind": "vq", "codes": 1}, 1, 4).eval()
    with KeyHistograms({"layer0": quantizer, "layer_1$": quantizer}) as heard:
        quantizer(torch.zeros(1, 1, 3, 4))  # keys without an angle
    figure = draw_histograms(heard.histograms(), "valid, step 3")
    assert [len(axes.patches) for axes in figure.axes] == [2, 2, 2]
    picture = pixels(figure)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3 and picture.std() > 0
