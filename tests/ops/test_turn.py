"""Angle and ratio, compared with the matrix of `rotation`."""

from __future__ import annotations

import math

import pytest
import torch

from transformer_vq.ops import estimators
from transformer_vq.ops.turn import turn


@pytest.mark.parametrize("K", [2, 3, 16])
def test_equals_the_matrix_of_rotation(K):
    """G = ratio · R, and R turns one plane alone: tr R = K − 2 + 2 cos θ, |det G| = ratio^K."""
    torch.manual_seed(0)
    for k, q in torch.randn(20, 2, K, dtype=torch.float64):
        matrix = torch.autograd.functional.jacobian(lambda x, q=q: estimators.apply("rotation", x, q), k)
        angle, ratio = turn(k, q)
        assert ratio == pytest.approx(abs(torch.det(matrix).item()) ** (1 / K), rel=1e-10)
        cosine = (torch.trace(matrix / ratio).item() - K + 2) / 2
        assert math.cos(angle) == pytest.approx(cosine, abs=1e-10)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_small_and_straight_angles_keep_their_digits(size):
    one, other = torch.tensor([[1.0, 0.0], [1.0, 1e-5], [-1.0, 1e-5]]), torch.tensor([2.0, 0.0])
    angle, ratio = turn(one * size, other.expand(3, 2))
    assert torch.allclose(angle, torch.tensor([0.0, 1e-5, math.pi - 1e-5]), rtol=1e-6, atol=0)
    assert torch.allclose(ratio, torch.tensor(2 / size), rtol=1e-5)


def test_a_zero_row_has_no_angle():
    angle, ratio = turn(torch.zeros(2, 3, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bfloat16))
    assert angle.isnan().all() and (ratio == 1).all() and angle.dtype == torch.float32
