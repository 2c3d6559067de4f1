"""fsq, ifsq, lfq and bsq: quantized keys are rows of the codebook, gradients those of the smooth chain around it."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_same
from torch.nn import functional as F

from transformer_vq.ops.nearest import lookup
from transformer_vq.quantizers import build_quantizer

H, K = 2, 6
KINDS = [
    {"kind": "fsq", "levels": [8, 5]},
    {"kind": "ifsq", "levels": [4, 3, 3]},
    {"kind": "lfq", "bits": 5},
    {"kind": "bsq", "bits": 4},
]
CASES = [{**kind, "expansion": e} for kind in KINDS for e in ("linear", "mlp")]


def name(case):
    return f"{case['kind']}-{case.get('expansion', 'linear')}"


def keys(dtype=torch.float64, T=200):
    return torch.randn(3, H, T, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_quantized_keys_are_rows_of_the_codebook_bit_for_bit(case, dtype):
    q = build_quantizer(case, H, K).to(dtype)
    out = q(keys(dtype))
    size = math.prod(case.get("levels", [2] * case.get("bits", 0)))
    assert q.codebook.shape == (H, size, K)
    assert out.codes.min() >= 0 and out.codes.max() < size
    assert torch.equal(out.quantized, lookup(q.codebook.to(dtype), out.codes))
    with torch.autocast("cpu", torch.bfloat16):
        cast = q(keys(dtype))
        assert torch.equal(cast.quantized, lookup(q.codebook.to(dtype), cast.codes))
        assert torch.equal(cast.codes, out.codes)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_gradients_are_those_of_the_chain_with_a_straight_through_rounding(case):
    """(x − sg x) + sg(rounded x) by plain autograd; parameters and keys."""
    q = build_quantizer(case, H, K).double()
    k = keys(T=5).requires_grad_()
    weight = torch.randn(3, H, 5, K, dtype=torch.float64)
    parameters = [k, *q.parameters()]
    got = torch.autograd.grad((q(k).quantized * weight).sum(), parameters)

    z = torch.einsum("bhtk,hdk->bhtd", k, q.project.weight)
    if case["kind"] in ("fsq", "ifsq"):
        L = torch.tensor(case["levels"], dtype=torch.float64)
        half, offset = (L - 1) * (1 - 1e-3) / 2, (1 - L % 2) / 2
        x = z + (offset / half).tan()
        bounded = (x.tanh() if case["kind"] == "fsq" else 2 * torch.sigmoid(1.6 * x) - 1) * half - offset
        smooth, rounded = bounded / (L // 2), bounded.round() / (L // 2)
    else:
        smooth = F.normalize(z, dim=-1) if case["kind"] == "bsq" else z
        rounded = smooth.sign() * (case["bits"] ** -0.5 if case["kind"] == "bsq" else 1)
    hidden = smooth - smooth.detach() + rounded.detach()
    if case["expansion"] == "mlp":
        hidden = F.gelu(torch.einsum("bhtd,hde->bhte", hidden, q.expand.inner) + q.expand.inner_bias[:, None])
    y = torch.einsum("bhte,hek->bhtk", hidden, q.expand.weight) + q.expand.bias[:, None]
    want = torch.autograd.grad((y * weight).sum(), parameters)
    assert_same({str(i): g for i, g in enumerate(got)}, {str(i): g for i, g in enumerate(want)}, rtol=1e-10)


@pytest.mark.parametrize("case", KINDS, ids=name)
def test_a_linear_expansion_gives_keys_of_the_rank_of_the_digits(case):
    d = len(case["levels"]) if "levels" in case else case["bits"]
    linear, mlp = (build_quantizer({**case, "expansion": e}, H, 16).codebook.detach() for e in ("linear", "mlp"))
    assert torch.linalg.matrix_rank(linear - linear.mean(1, keepdim=True)).tolist() == [d, d]
    assert (torch.linalg.matrix_rank(mlp - mlp.mean(1, keepdim=True)) > d).all()


@pytest.mark.parametrize("levels", [[8, 4, 4], [8, 6, 5], [8, 5, 5, 5]])
def test_the_papers_keys_use_most_codes_from_the_start(levels):
    k = torch.randn(1, 1, 20_000, 64, generator=torch.Generator().manual_seed(0))
    k = k / k.square().mean(-1, keepdim=True).sqrt() / 64**0.25  # ‖k‖² = √K
    out = build_quantizer({"kind": "fsq", "levels": levels}, 1, 64)(k)
    assert out.metrics["usage"] > 0.9
    assert out.metrics["perplexity"] > 0.4 * math.prod(levels)
    assert out.metrics["cosine"] > 0


@pytest.mark.parametrize("case", KINDS, ids=name)
def test_more_digits_than_dimensions(case):
    out = build_quantizer(case, 1, 2)(torch.randn(1, 1, 50, 2))
    assert out.quantized.shape == (1, 1, 50, 2)
    assert out.metrics["usage"] > 0.05


@pytest.mark.parametrize("case", KINDS, ids=name)
def test_padding_is_invisible(case):
    mask = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) > 0.5
    outs = []
    for filling in (0.0, 30.0):
        settings = {**case, "commit": 0.5} | ({"entropy_weight": 0.1} if "bits" in case else {})
        q = build_quantizer(settings, H, K).double()
        k = torch.where(mask[:, None, :, None], keys(T=40), filling).requires_grad_()
        out = q(k, mask)
        (grad,) = torch.autograd.grad(out.loss, k)
        assert grad.any() and not grad[~mask[:, None].expand(3, H, 40)].any()
        outs.append({"loss": out.loss, "grad": grad, **out.metrics})
    assert_same(outs[1], outs[0], rtol=1e-14)


def test_sign_commitment_is_the_distance_to_the_signs():
    q = build_quantizer({"kind": "lfq", "bits": 5, "commit": 0.3}, H, K).double()
    k = keys(T=5)
    z = q.project(k)
    out = q(k)
    assert_same({"c": out.commitment}, {"c": (z - z.sign()).square().sum((1, 3)).mean()}, rtol=1e-12)
    assert_same({"l": out.loss}, {"l": 0.3 * out.commitment}, rtol=1e-12)


@pytest.mark.parametrize("estimator", ["rotation", "random_rotation", "ibq", "gumbel"])
def test_sign_quantizers_take_any_estimator(estimator):
    q = build_quantizer({"kind": "bsq", "bits": 4, "estimator": estimator}, H, K)
    k = keys(torch.float32, T=5).requires_grad_()
    out = q(k)
    assert torch.equal(out.quantized, lookup(q.codebook, out.codes))
    (grad,) = torch.autograd.grad(out.quantized.square().sum(), k)
    assert grad.isfinite().all() and grad.any()


def test_fsq_before_its_start_passes_keys():
    q = build_quantizer({"kind": "fsq", "levels": [4, 4], "start_step": 2}, H, K).double()
    k = keys(T=5)
    assert q.warming_up and torch.equal(q(k).quantized, k)
    q.set_step(2)
    assert not torch.equal(q(k).quantized, k) and not q.warming_up
