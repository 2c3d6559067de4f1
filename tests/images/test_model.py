from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_same
from image_cases import images_config
from torch.nn import functional as F

from transformer_vq.config import ConfigError
from transformer_vq.images.model import ImageModel

KINDS: list[dict[str, Any]] = [
    {"codes": 16},
    {"codes": 16, "estimator": "rotation", "lookup": "cosine"},
    {"codes": 16, "codebook": "gradient", "estimator": "diveq"},
    {"codes": 16, "codebook": "gradient", "estimator": "gumbel"},
    {"codes": 16, "codebook": "gradient", "estimator": "nsvq", "codebook_weight": 0.0},
    {"codes": 16, "codebook": "gradient", "estimator": "diveq_noise", "codebook_weight": 0.0},
    {"codes": 16, "codebook": "gradient", "estimator": "sf_diveq", "codebook_weight": 0.0},
    {"codes": 16, "estimator": "exact"},
    {"codes": 16, "estimator": "hessian"},
    {"kind": "simvq", "codes": 16},
    {"kind": "fsq", "levels": [4, 4]},
    {"kind": "ifsq", "levels": [4, 4]},
    {"kind": "lfq", "bits": 4},
    {"kind": "bsq", "bits": 4},
]


def model(quantizer: dict[str, Any] | None = None, dtype: torch.dtype = torch.float64, **keys: Any) -> ImageModel:
    return ImageModel(images_config(quantizer, **keys), channels=1, seed=0).to(dtype)


def pictures(n: int = 3, channels: int = 1) -> torch.Tensor:
    return torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def name_of(quantizer: dict[str, Any]) -> str:
    return "-".join(str(v) for v in quantizer.values())


@pytest.mark.parametrize("quantizer", KINDS, ids=name_of)
def test_everything_learns_from_the_loss(quantizer):
    net = model(quantizer).train()
    net.set_step(0)
    out = net(pictures())
    (out.loss + out.latents.loss).backward()
    net.apply_codebook_statistics()
    for name, p in net.named_parameters():
        if name.startswith(("encoder", "decoder")):
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
    if quantizer.get("codebook") == "gradient":
        assert net.quantizer.quantizers[0].codebook.grad.abs().sum() > 0


SHAPES: list[dict[str, Any]] = [
    {},
    {"product": 2},
    {"latent_channels": 5, "attention": "lowest"},
    {"patch": 2, "multipliers": [1]},
]
PAIRS = [(q, keys) for q in KINDS for keys in SHAPES] + [(q, {"residual": 3, "product": 2}) for q in KINDS[:3]]


@pytest.mark.parametrize(("quantizer", "keys"), PAIRS, ids=str)
def test_decoded_codes_are_the_reconstruction(quantizer, keys):
    net = model(quantizer, **keys).eval()
    with torch.no_grad():
        codes = net.encode(pictures())
        assert codes.shape == (3, keys.get("residual", 1), keys.get("product", 1), 4, 4)
        assert_same({"x": net.decode(codes)}, {"x": net(pictures()).pictures}, rtol=1e-12)


def test_none_is_a_plain_autoencoder():
    net = model({"kind": "none"}).train()
    x = pictures()
    out = net(x)
    assert_same({"x": out.pictures}, {"x": net.decoder(net.encoder(x))}, rtol=0)
    assert out.loss == F.mse_loss(out.pictures, x) and out.latents.loss == 0 and not out.latents.codes.numel()


def test_residual_stages_leave_less_and_less():
    net = model({"codes": 16, "init": "kmeans"}, residual=3).train()
    x = pictures(20)
    for step in range(3):
        net.set_step(step)
        net(x)
        net.apply_codebook_statistics()
    stages = net(x).latents.stages
    errors = [(s.k - s.result.quantized).square().sum(-1).mean().item() for s in stages]
    assert errors[0] > errors[1] > errors[2]


def test_residual_stages_do_not_multiply_the_gradient():
    x = pictures()
    grads = []
    for residual in (1, 3):
        latents = model({"codes": 16, "commit": 0.0}, residual=residual).train().quantizer
        z = torch.randn(2, 6, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
        latents(z).quantized.backward(torch.ones_like(z))
        grads.append(z.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], torch.ones_like(x[:1, :1, :1, :1]).expand_as(z))


def test_product_parts_have_codebooks_of_their_own():
    net = model({"codes": 16}, product=2).eval()
    k = net.quantizer._rows(net.encoder(pictures()))
    codes = net.encode(pictures())
    books = net.quantizer.quantizers[0].codebook
    for part in range(2):
        want = torch.cdist(k[0, part], books[part]).argmin(-1).view(3, 4, 4)
        assert torch.equal(codes[:, 0, part], want)


def test_exact_gives_the_encoder_the_gradient_at_its_own_latents():
    net = model({"codes": 16, "estimator": "exact", "commit": 0.0}).train()
    x = pictures()
    net(x).loss.backward()
    got = [p.grad.clone() for p in net.encoder.parameters()]
    want = torch.autograd.grad(F.mse_loss(net.decoder(net.encoder(x)), x), list(net.encoder.parameters()))
    assert_same(dict(enumerate(got)), dict(enumerate(want)), rtol=1e-10)
    got = [p.grad.clone() for p in net.decoder.parameters()]
    q = net(x).latents.quantized.detach()
    want = torch.autograd.grad(F.mse_loss(net.decoder(q), x), list(net.decoder.parameters()))
    assert_same(dict(enumerate(got)), dict(enumerate(want)), rtol=1e-10)


def test_image_only_estimators_leave_the_codebook_in_training_alone():
    for name in ("nsvq", "diveq_noise", "sf_diveq"):
        net = model({"codes": 16, "codebook": "gradient", "estimator": name})
        rows = lambda out: net.quantizer._rows(out.latents.quantized)[0, 0]
        book = net.quantizer.quantizers[0].codebook[0]
        assert (torch.cdist(rows(net.train()(pictures())), book).amin(-1) > 1e-6).any(), name
        assert (torch.cdist(rows(net.eval()(pictures())), book).amin(-1) < 1e-6).all(), name


def test_noise_depends_on_seed_and_step_alone():
    net = model({"codes": 16, "codebook": "gradient", "estimator": "nsvq"}).train()
    draws = []
    for step in (3, 3, 4):
        net.set_step(step)
        draws.append(net(pictures()).pictures)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_the_papers_networks_have_its_grids():
    """1024 codes x 32 on a 16x16 grid, and 8192 x 3 on a 64x64 grid, of 256x256 pictures; here at an eighth of both."""
    for multipliers, width, grid in (([1, 1, 2, 2, 4], 32, 2), ([1, 2, 4], 3, 8)):
        net = model({"codes": 8}, width=2, multipliers=multipliers, blocks=2, code_dim=width, attention="middle")
        x = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
        assert net.encoder(x).shape == (1, width, grid, grid) and net(x).pictures.shape == x.shape


def test_codes_that_do_not_exist_are_refused():
    net = model().eval()
    with pytest.raises(ValueError, match=r"codes lie in 0\.\.16: there are 16"):
        net.decode(torch.tensor([0, 16]).view(1, 1, 1, 1, 2))
    with pytest.raises(ValueError, match="1 stages of 1 parts"):
        net.decode(torch.zeros(1, 2, 1, 4, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("quantizer", "keys", "message"),
    [
        ({"codes": 8, "estimator": "nsvq"}, {}, "estimator = nsvq: needs kind: vq with codebook: gradient"),
        ({"kind": "fsq"}, {"residual": 2}, "residual = 2: needs quantizer.kind vq or simvq, not fsq"),
        ({"codes": 8}, {"product": 4}, "product = 4: must divide code_dim = 6"),
        ({"codes": 8, "estimator": "exact"}, {"gan": {}}, "estimator = exact: needs gan: null"),
        ({"codes": 8, "estimator": "rotation_centred"}, {"residual": 2}, "needs residual: 1"),
        ({"codes": 8, "start_step": 3}, {"residual": 2}, "start_step = 3: needs residual: 1"),
    ],
)
def test_impossible_combinations(quantizer, keys, message):
    with pytest.raises(ConfigError, match=message):
        images_config(quantizer, **keys)
