"""The gradient of a smoothed staircase, against closed forms of the normal distribution."""

from __future__ import annotations

import pytest
import torch

from transformer_vq.ops.smoothing import code_gradients, score_gradient

NORMAL = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)


def density(x):
    return NORMAL.log_prob(x).exp()


def draws(n, width, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sigma", [0.4, 1.0])
@pytest.mark.parametrize("at", [-1.3, -0.2, 0.6])
def test_on_a_line_it_is_the_density_at_the_borders(at, sigma):
    """P_s = Φ((b_s − k)/σ) − Φ((b_{s−1} − k)/σ) between borders b, so ∇P_s = (φ at the lower − φ at the upper)/σ."""
    codebook = torch.tensor([[-1.0], [0.5], [2.0]], dtype=torch.float64)
    borders = torch.tensor([-torch.inf, -0.25, 1.25, torch.inf], dtype=torch.float64)
    heights = density((borders - at) / sigma).nan_to_num(0.0) / sigma
    want = heights[:-1] - heights[1:]
    found = code_gradients(torch.tensor([at], dtype=torch.float64), codebook, draws(200_000, 1), sigma)
    got = (found.first + found.second)[:, 0] / 2
    assert (got - want).abs().max() < 0.015 / sigma
    chances = NORMAL.cdf((borders[1:] - at) / sigma) - NORMAL.cdf((borders[:-1] - at) / sigma)
    assert (found.share - chances).abs().max() < 0.005


def test_in_the_plane_it_is_a_product():
    """Codes at the four corners of a square: the cells are quadrants."""
    codebook = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    k, sigma = torch.tensor([0.3, -0.5], dtype=torch.float64), 0.8
    positive, slope = NORMAL.cdf(k / sigma), density(k / sigma) / sigma
    side = [[(1 - p, -d), (p, d)] for p, d in zip(positive, slope, strict=True)]  # by coordinate: P and its slope
    want = torch.stack([torch.stack([a[1] * b[0], a[0] * b[1]]) for a in side[0] for b in side[1]])
    found = code_gradients(k, codebook, draws(200_000, 2), sigma)
    assert ((found.first + found.second) / 2 - want).abs().max() < 0.01


def test_the_loss_of_each_code_is_all_that_is_needed():
    """Σ_s F_s ∇P_s is the score function of F itself, draw for draw."""
    k, codebook, noise = draws(1, 5, 1)[0], draws(7, 5, 2), draws(64, 5, 3)
    values = draws(7, 1, 4)[:, 0]
    nearest = lambda x: torch.cdist(x, codebook).argmin(-1)
    change = values[nearest(k + 0.9 * noise)] - values[nearest(k - 0.9 * noise)]
    found = code_gradients(k, codebook, noise, 0.9)
    for half, part in ((found.first, slice(32)), (found.second, slice(32, 64))):
        torch.testing.assert_close(values @ half, score_gradient(change[part], noise[part], 0.9))


def test_of_a_plane_it_is_exactly_known_and_of_a_square_its_slope():
    noise = draws(100_000, 4)
    slope = torch.tensor([1.0, -2.0, 0.0, 3.0], dtype=torch.float64)
    plane = score_gradient(2 * 0.7 * noise @ slope, noise, 0.7)
    assert (plane - slope).abs().max() < 0.06
    k = torch.tensor([0.2, 0.0, -1.0, 0.5], dtype=torch.float64)  # of ‖k‖², smoothed it is ‖k‖² + const
    square = score_gradient((k + 0.7 * noise).square().sum(-1) - (k - 0.7 * noise).square().sum(-1), noise, 0.7)
    assert (square - 2 * k).abs().max() < 0.06


def test_the_two_halves_give_the_square_of_the_length_without_bias():
    codebook, k, sigma = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64), torch.zeros(2).double(), 1.0
    true = float(density(torch.zeros(()).double())) ** 2  # of the gradient of P of the second code
    both, one = [], []
    for seed in range(1500):
        found = code_gradients(k, codebook, draws(8, 2, seed), sigma)
        both.append(float(found.first[1] @ found.second[1]))
        one.append(float(((found.first + found.second)[1] / 2).square().sum()))
    both, one = torch.tensor(both), torch.tensor(one)
    assert abs(both.mean() - true) < 4 * both.std() / 1500**0.5
    assert one.mean() - true > 7 * one.std() / 1500**0.5  # which is why there are two


def test_the_lookup_of_the_layer_is_used():
    codebook = torch.tensor([[0.1, 0.0], [0.0, 9.0]], dtype=torch.float64)
    k, noise = torch.tensor([1.0, 0.9], dtype=torch.float64), draws(4000, 2)
    near, turned = (code_gradients(k, codebook, noise, 0.5, metric).share[0] for metric in ("euclidean", "cosine"))
    assert near > 0.99 and 0.4 < turned < 0.7


def test_draws_that_cannot_be_halved_are_refused():
    with pytest.raises(ValueError, match="3 draws"):
        code_gradients(torch.zeros(2), torch.randn(4, 2), torch.randn(3, 2), 1.0)
