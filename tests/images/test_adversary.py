from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from transformer_vq.config.images import GANConfig
from transformer_vq.images.adversary import discriminator_term, frozen, generator_term
from transformer_vq.images.networks import PatchDiscriminator


def setting(dtype=torch.float64):
    torch.manual_seed(0)
    decoder = torch.nn.Conv2d(1, 1, 3, padding=1).to(dtype)
    critic = PatchDiscriminator(1, width=4, layers=2).to(dtype)
    x = torch.rand(2, 1, 16, 16, dtype=dtype)
    return decoder, critic, x


def test_the_generators_term_moves_the_decoder_and_not_the_discriminator():
    decoder, critic, x = setting()
    fake = decoder(x)
    term, weight = generator_term(critic, fake, F.mse_loss(fake, x), decoder.weight, GANConfig(weight=0.5))
    term.backward()
    assert all(p.grad is None for p in critic.parameters())
    want = torch.autograd.grad(-0.5 * critic(decoder(x)).mean() * weight / 0.5, decoder.weight)[0]
    assert torch.allclose(decoder.weight.grad, want, rtol=1e-10)


def test_the_adaptive_weight_balances_the_two_gradients_at_the_last_layer():
    decoder, critic, x = setting()
    fake = decoder(x)
    loss = F.mse_loss(fake, x)
    term, weight = generator_term(critic, fake, loss, decoder.weight, GANConfig(weight=1.0))
    (a,) = torch.autograd.grad(loss, decoder.weight, retain_graph=True)
    (b,) = torch.autograd.grad(-critic(fake).mean(), decoder.weight, retain_graph=True)
    assert weight.item() == pytest.approx((a.norm() / (b.norm() + 1e-4)).item(), rel=1e-10)
    _, plain = generator_term(critic, fake, loss, decoder.weight, GANConfig(weight=0.3, adaptive=False))
    assert plain.item() == pytest.approx(0.3)
    assert term.requires_grad and not weight.requires_grad


def test_frozen_is_the_module_with_constants_for_parameters():
    _, critic, x = setting()
    x.requires_grad_()
    assert torch.equal(frozen(critic, x), critic(x))
    frozen(critic, x).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in critic.parameters())


def test_discriminator_losses_against_their_formulas():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.25])
    assert discriminator_term(real, fake, "hinge").item() == pytest.approx(0.5 * (0.25 + 0.625))
    want = 0.5 * (torch.log1p(torch.exp(-real)).mean() + torch.log1p(torch.exp(fake)).mean())
    assert discriminator_term(real, fake, "vanilla").item() == pytest.approx(want.item())


def test_a_discriminator_halves_as_often_as_asked():
    assert PatchDiscriminator(3, width=4, layers=3)(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 6, 6)
