"""Which parameter gets which optimizer and decay, and that each optimizer does what its source says."""

import pytest
import torch
from helpers import assert_same
from torch import nn

from transformer_vq.config import TransformerVQConfig
from transformer_vq.config.run import OptimizationConfig
from transformer_vq.models import TransformerVQ
from transformer_vq.training.optimizers import Adafactor, Optimizers, hidden_matrices


def with_gradients(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def small_model() -> TransformerVQ:
    settings = TransformerVQConfig(vocab_size=11, layers=2, width=8, key_dim=4, value_dim=8, window=4, block_len=4)
    return TransformerVQ(settings)


def test_decay_takes_everything_that_is_not_one_dimensional():
    model = nn.Module()
    model.matrix, model.bias, model.scale = (nn.Parameter(torch.ones(shape)) for shape in [(2, 3), (3,), ()])
    train = OptimizationConfig(weight_decay=0.1, decay_scaled_by_lr=False, clip=None)
    optimizers = Optimizers(model, train)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers.step(rate=1e-3, norm=optimizers.gradient_norm())
    assert model.matrix.unique().item() == model.scale.item() == pytest.approx(0.9)
    assert torch.equal(model.bias, torch.ones(3))


@pytest.mark.parametrize(("scaled", "factor"), [(True, 1 - 0.1 * 1e-2), (False, 1 - 0.1)])
def test_adamw_with_decay_is_the_formula(scaled, factor):
    module = nn.Linear(3, 2).double()
    train = OptimizationConfig(weight_decay=0.1, decay_scaled_by_lr=scaled, clip=None, betas=(0.9, 0.98), eps=1e-9)
    optimizers, w = Optimizers(module, train), module.weight.detach().clone()
    m = v = torch.zeros_like(w)
    for t in range(1, 4):
        with_gradients(module, seed=t)
        g = module.weight.grad
        m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g.square()
        w = factor * w - 1e-2 * (m / (1 - 0.9**t)) / ((v / (1 - 0.98**t)).sqrt() + 1e-9)
        optimizers.step(rate=1e-2, norm=optimizers.gradient_norm())
    assert_same({"w": module.weight.detach()}, {"w": w}, rtol=1e-12)


def test_clipping_bounds_the_global_norm():
    module = nn.Linear(3, 2)
    with_gradients(module)
    optimizers = Optimizers(module, OptimizationConfig(clip=0.1))
    norm = optimizers.gradient_norm()
    assert norm.item() == pytest.approx(sum(p.grad.square().sum().item() for p in module.parameters()) ** 0.5)
    optimizers.step(rate=0.0, norm=norm)
    assert optimizers.gradient_norm().item() == pytest.approx(0.1, rel=1e-4)


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    model = small_model()
    hidden = hidden_matrices(model)
    assert "layers.0.q_proj.weight" in hidden and "layers.1.out_proj.weight" in hidden
    assert not {"embedding.weight", "head.weight", "layers.0.norm.weight"} & hidden
    muon, adamw = Optimizers(model, OptimizationConfig(optimizer="muon")).optimizers
    named = dict(model.named_parameters())
    assert {id(p) for p in muon.param_groups[0]["params"]} == {id(named[name]) for name in hidden}
    assert len(muon.param_groups[0]["params"]) + len(adamw.param_groups[0]["params"]) == len(named)


def test_codebooks_moved_by_averages_are_in_no_optimizer():
    model = small_model()
    mine = {id(p) for p in Optimizers(model, OptimizationConfig()).named.values()}
    assert not any(id(b) in mine for b in model.buffers())
    assert not any("ema" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("shape", [(128, 160), (2, 128, 130), (127, 160), (5,)])
def test_adafactor_is_the_formula(shape):
    """Second moments as outer products, written out; factored only where both of the last axes have 128 entries."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) * 0.02)
    optimizer, w, mean = Adafactor([p], lr=1e-2), p.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    for t in range(1, 4):
        p.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        beta = 1 - t**-0.8
        mean = beta * mean + (1 - beta) * (p.grad**2 + 1e-30)  # row and column means are linear in it
        v = mean
        if len(shape) > 1 and min(shape[-2:]) >= 128:
            v = mean.mean(-1, keepdim=True) * mean.mean(-2, keepdim=True) / mean.mean((-1, -2), keepdim=True)
        u = p.grad / v.sqrt()
        u = u / max(1.0, u.square().mean().sqrt().item())
        w = w - 1e-2 * u * max(1e-3, w.square().mean().sqrt().item())
        optimizer.step()
    assert_same({"w": p.detach()}, {"w": w}, rtol=1e-10)


@pytest.mark.parametrize("kind", ["adamw", "muon", "adafactor"])
def test_state_comes_back_bit_for_bit(kind):
    train = OptimizationConfig(optimizer=kind, weight_decay=0.1)
    straight, stopped = small_model(), small_model()
    one, two = Optimizers(straight, train), Optimizers(stopped, train)
    for seed in range(3):
        for module, optimizers in ((straight, one), (stopped, two)):
            with_gradients(module, seed)
            optimizers.step(1e-2, optimizers.gradient_norm())
        resumed = Optimizers(stopped, train)
        resumed.load(two.state())
        two = resumed
    for (name, p), q in zip(straight.named_parameters(), stopped.parameters(), strict=True):
        assert torch.equal(p, q), name
