"""Agreement with vector-quantize-pytorch 1.32.0, and the differences that the docstrings name."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from helpers import assert_same
from vector_quantize_pytorch import FSQ, SimVQ, VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import directional_reparam, orthogonal_loss_fn, rotate_to

from transformer_vq.ops import estimators, fsq
from transformer_vq.ops.nearest import lookup
from transformer_vq.quantizers import build_quantizer
from transformer_vq.quantizers.losses import orthogonality

N, K, S = 200, 8, 16


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_version_that_was_compared():
    assert version("vector-quantize-pytorch") == "1.32.0"


def test_rotation_has_their_gradient_and_not_their_forward():
    k, q, g = torch.randn(3, N, K, generator=seeded())
    k.requires_grad_()
    ours, theirs = estimators.apply("rotation", k, q), rotate_to(k, q)
    grads = [torch.autograd.grad(x, k, g)[0] for x in (ours, theirs)]
    assert_same({"k": grads[0]}, {"k": grads[1]}, rtol=1e-5)
    assert torch.equal(ours, q)
    assert (theirs == q).float().mean() < 0.5  # nearly q, and nearly is another code
    assert_same({"q": theirs}, {"q": q}, rtol=1e-5)


def test_short_vectors_are_where_rotations_differ():
    """Theirs divides by lengths of at least 1e-6; G does not depend on the common size of k and q."""
    k, q, g = torch.randn(3, N, K, generator=seeded())
    grads = {}
    for size in (1.0, 1e-9):
        small = (k * size).requires_grad_()
        for name, function in (("ours", lambda k, q: estimators.apply("rotation", k, q)), ("theirs", rotate_to)):
            grads[name, size] = torch.autograd.grad(function(small, q * size), small, g)[0]
    assert_same({"k": grads["ours", 1e-9]}, {"k": grads["ours", 1.0]}, rtol=1e-5)
    assert (grads["theirs", 1e-9] - grads["theirs", 1.0]).abs().max() > 0.1


def test_diveq_without_noise_has_their_gradient():
    k, q, g = torch.randn(3, N, K, generator=seeded(), dtype=torch.float64)
    k.requires_grad_(), q.requires_grad_()
    grads = [
        torch.autograd.grad(x, (k, q), g) for x in (estimators.apply("diveq", k, q), directional_reparam(k, q, 0.0))
    ]
    assert_same(dict(zip("kq", grads[0], strict=True)), dict(zip("kq", grads[1], strict=True)), rtol=1e-10)
    noisy = directional_reparam(k, q)  # as published: off the codebook, as `diveq_noise`
    assert (noisy - q).abs().max() > 1e-3
    ours = estimators.apply("diveq_noise", k, q, generator=seeded())
    assert_same({"length": (ours - k).norm(dim=-1)}, {"length": (noisy - k).norm(dim=-1)}, rtol=1e-6)


def pair(eps, gamma=0.9, cosine=False):
    """Our quantizer and theirs, from one codebook."""
    ours = build_quantizer(
        {"kind": "vq", "codes": S, "ema": gamma, "lookup": "cosine" if cosine else "euclidean"}, 1, K
    )
    theirs = VectorQuantize(dim=K, codebook_size=S, decay=gamma, eps=eps, use_cosine_sim=cosine, rotation_trick=False)
    inner = theirs._codebook
    if cosine:
        ours.ema_sum.copy_(torch.nn.functional.normalize(ours.ema_sum, dim=-1))
    inner.embed.data.copy_(ours.codebook)
    inner.embed_avg.data.copy_(ours.ema_sum)
    inner.cluster_size.data.copy_(ours.ema_count)
    return ours, theirs


def ten_steps(ours, theirs):
    for step in range(10):
        x = torch.randn(1, N, K, generator=seeded(step))
        codes = ours(x[None]).codes[0, 0]
        ours.apply_codebook_statistics()
        assert torch.equal(codes, theirs(x)[1][0])


def test_ten_ema_steps_from_the_same_codebook():
    ours, theirs = pair(eps=0.0)
    ten_steps(ours, theirs)
    inner = theirs._codebook
    got = {"codebook": ours.codebook, "sum": ours.ema_sum, "count": ours.ema_count}
    assert_same(got, {"codebook": inner.embed, "sum": inner.embed_avg, "count": inner.cluster_size}, rtol=1e-5)


def test_their_smoothing_is_a_small_difference():
    ours, theirs = pair(eps=1e-2)
    ten_steps(ours, theirs)
    difference = (ours.codebook - theirs._codebook.embed).abs().max() / ours.codebook.abs().max()
    assert 1e-5 < difference < 1e-1


def test_their_codebook_moves_in_every_forward_pass():
    ours, theirs = pair(eps=0.0)
    before = ours.codebook.clone()
    x = torch.randn(1, N, K, generator=seeded())
    ours(x[None]), theirs(x)
    assert torch.equal(ours.codebook, before)
    assert not torch.equal(theirs._codebook.embed, before)


def test_cosine_lookup_picks_their_codes_and_keeps_the_length_of_ours():
    ours, theirs = pair(eps=0.0, cosine=True)
    ours.ema_sum *= torch.rand(1, S, 1, generator=seeded()) + 0.5
    x = torch.randn(1, N, K, generator=seeded(1))
    out, (quantized, codes, _) = ours.eval()(x[None]), theirs.eval()(x)
    assert torch.equal(out.codes[0, 0], codes[0])
    assert_same({"length": quantized.norm(dim=-1)}, {"length": torch.ones(1, N)}, rtol=1e-5)
    assert torch.equal(out.quantized, lookup(ours.codebook, out.codes))


@pytest.mark.parametrize("estimator", ["ste", "rotation"])
def test_simvq(estimator):
    """Codes, gradients of keys and map; their losses are means over the width, ours are sums: a factor of K."""
    settings = {"kind": "simvq", "codes": S, "estimator": estimator, "commit": 0.25, "codebook_weight": 1.0}
    ours, theirs = (
        build_quantizer(settings, 1, K),
        SimVQ(dim=K, codebook_size=S, rotation_trick=estimator == "rotation"),
    )
    with torch.no_grad():
        ours.frozen.copy_(theirs.frozen_codebook[None])
        ours.weight.copy_(theirs.code_transform.weight.T[None])
    x = torch.randn(1, N, K, generator=seeded()).requires_grad_()
    g = torch.randn(1, N, K, generator=seeded(1))
    out, (quantized, codes, loss) = ours(x[None]), theirs(x)
    assert torch.equal(out.codes[0, 0], codes[0])
    assert_same({"q": out.quantized[0], "loss": out.loss}, {"q": quantized, "loss": K * loss}, rtol=1e-5)
    through = [torch.autograd.grad(y, x, g, retain_graph=True)[0] for y in (out.quantized[0], quantized)]
    assert_same({"x": through[0]}, {"x": through[1]}, rtol=1e-5)
    got = torch.autograd.grad(out.loss, (x, ours.weight))
    want = torch.autograd.grad(K * loss, (x, theirs.code_transform.weight))
    assert_same({"x": got[0], "W": got[1][0].T}, {"x": want[0], "W": want[1]}, rtol=1e-5)


@pytest.mark.parametrize("levels", [[8, 4, 4], [5, 3], [8, 5, 5, 5]])
def test_fsq_codes(levels):
    theirs = FSQ(levels=levels)
    assert torch.equal(fsq.implied_values(levels, torch.float32), theirs.implicit_codebook)
    z = torch.randn(1, 20_000, len(levels), generator=seeded())
    quantized, codes = theirs(z)

    # their form of the bound, our arithmetic around it: every code the same
    L = torch.tensor(levels)
    half, offset = (L - 1) * (1 + 1e-3) / 2, torch.where(L % 2 == 0, 0.5, 0.0)
    digits = fsq.bounded_to_digits((z + (offset / half).atanh()).tanh() * half - offset, levels)
    assert torch.equal(fsq.digits_to_codes(digits, levels), codes.long())
    assert torch.equal(fsq.digits_to_values(digits, levels, torch.float32), quantized)

    # the paper's form: the same levels, a little elsewhere
    differ = (fsq.digits_to_codes(fsq.bounded_to_digits(fsq.bound(z, levels), levels), levels) != codes).float().mean()
    assert 0 < differ < 0.02


def test_orthogonality_loss():
    codebook = torch.randn(3, S, K, generator=seeded())
    assert_same({"o": orthogonality(codebook)}, {"o": orthogonal_loss_fn(codebook)}, rtol=1e-5)
