"""Codebook losses against their formulas."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same

from transformer_vq.quantizers import build_quantizer, losses
from transformer_vq.quantizers.losses import diversity, orthogonality, squared_distance, wasserstein

H, K, S = 2, 4, 6


def codebook(seed=0):
    return torch.randn(H, S, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_squared_distance_and_both_gradients(dtype):
    a, b = torch.randn(2, 3, H, 5, K, dtype=torch.float64).to(dtype)
    a.requires_grad_(), b.requires_grad_()
    weight = torch.randn(3, H, 5)
    got = squared_distance(a, b)
    wide = [x.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_() for x in (a, b)]
    want = (wide[0] - wide[1]).square().sum(-1)
    assert got.dtype == want.dtype
    grads = torch.autograd.grad((got * weight).sum(), (a, b)), torch.autograd.grad((want * weight).sum(), wide)
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-6
    assert_same({"d": got}, {"d": want}, rtol=1e-6)
    assert_same(dict(zip("ab", grads[0], strict=True)), dict(zip("ab", grads[1], strict=True)), rtol=rtol)


def test_orthogonality_is_the_mean_squared_cosine_of_different_codes():
    c = codebook()
    cos = torch.cosine_similarity(c[:, :, None], c[:, None], dim=-1)
    off = (1 - torch.eye(S, dtype=torch.float64)) * cos.square()
    assert_same({"o": orthogonality(c)}, {"o": off.sum((1, 2)).mean() / S**2}, rtol=1e-12)
    assert orthogonality(torch.eye(4)[None]).abs() < 1e-7


@pytest.mark.parametrize("masked", [False, True])
def test_diversity_and_its_gradients(masked, monkeypatch):
    monkeypatch.setattr(losses, "ALIVE", S * 4)  # chunks of four keys
    k, c = torch.randn(3, H, 5, K, dtype=torch.float64).requires_grad_(), codebook()
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) > 0.4 if masked else None
    p = (-(k[..., None, :] - c[None, :, None]).square().sum(-1) / 0.7).softmax(-1).transpose(1, 2)
    mean = p[mask if masked else torch.ones(3, 5, dtype=torch.bool)].mean(0)
    want = (mean * mean.log()).sum(-1).mean()
    got = diversity(k, c, mask, 0.7)
    grads = [dict(zip("kc", torch.autograd.grad(x, (k, c)), strict=True)) for x in (got, want)]
    assert_same({"d": got}, {"d": want}, rtol=1e-12)
    assert_same(grads[0], grads[1], rtol=1e-10)


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def test_wasserstein_is_the_distance_of_two_normal_distributions():
    keys, c = torch.randn(H, 40, K, dtype=torch.float64) * 2 + 1, codebook()
    want = 0
    for h in range(H):
        a, b = keys[h], c[h]
        cov_a, cov_b = (torch.cov(x.T, correction=0) for x in (a, b))
        cross = root(root(cov_a) @ cov_b.detach() @ root(cov_a))
        squared = (a.mean(0) - b.mean(0)).square().sum() + torch.trace(cov_a + cov_b - 2 * cross)
        want = want + squared.sqrt() / H
    assert_same({"w": wasserstein(keys[None], c, None)}, {"w": want}, rtol=1e-8)
    assert torch.autograd.gradcheck(lambda c: wasserstein(keys[None], c, None), c)
    mask = torch.rand(2, 30, generator=torch.Generator().manual_seed(0)).argsort(1) < 20  # 20 of 30 are real
    padded = torch.full((2, H, 30, K), torch.nan, dtype=torch.float64)
    padded.transpose(1, 2)[mask] = keys.transpose(0, 1)
    assert_same({"w": wasserstein(padded, c, mask)}, {"w": want}, rtol=1e-8)


def test_wasserstein_vanishes_for_equal_moments_and_has_a_gradient_for_few_codes():
    c = codebook()
    assert wasserstein(c[None], c, None) < 1e-3
    few = c[:, :2].detach().requires_grad_()  # they span one dimension of four
    (grad,) = torch.autograd.grad(wasserstein(c[None], few, None), few)
    assert grad.isfinite().all() and grad.any()
    for keys, mask in ((c[None, :, :0], None), (c[None], torch.zeros(1, c.shape[1], dtype=torch.bool))):
        nothing = wasserstein(keys, few, mask)
        assert nothing == 0 and not torch.autograd.grad(nothing, few)[0].any()


def test_descending_on_wasserstein_moves_the_codes_to_the_keys():
    keys = torch.randn(1, 500, K, generator=torch.Generator().manual_seed(0)) + 5
    c = torch.randn(1, 64, K, generator=torch.Generator().manual_seed(1)).mul(0.1).requires_grad_()
    optimizer = torch.optim.Adam([c], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        wasserstein(keys[None], c, None).backward()
        optimizer.step()
    assert (c.mean(1) - 5).abs().max() < 0.3
    assert (c.std(1) - 1).abs().max() < 0.3


@pytest.mark.parametrize("name", ["orthogonality", "diversity", "wasserstein"])
def test_weights_enter_the_loss(name):
    k = torch.randn(3, H, 5, K)
    plain, weighted = (
        build_quantizer({"kind": "vq", "codes": S, "codebook": "gradient", f"{name}_weight": w}, H, K)(k)
        for w in (0, 2.0)
    )
    c = build_quantizer({"kind": "vq", "codes": S, "codebook": "gradient"}, H, K).codebook
    term = {
        "orthogonality": lambda: orthogonality(c),
        "diversity": lambda: diversity(k, c, None, 1.0),
        "wasserstein": lambda: wasserstein(k, c, None),
    }[name]()
    assert_same({"l": weighted.loss - plain.loss}, {"l": 2 * term}, rtol=1e-4)
