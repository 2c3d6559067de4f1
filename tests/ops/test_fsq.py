"""FSQ's bounding and codes against the formulas of its paper."""

from __future__ import annotations

import math

import pytest
import torch

from transformer_vq.ops import fsq

LEVELS = [[2], [3], [8, 4, 4], [5, 3], [8, 5, 5, 5], [7, 6]]


@pytest.mark.parametrize("squash", ["tanh", "sigmoid"])
@pytest.mark.parametrize("levels", LEVELS)
def test_bound_is_the_formula(levels, squash):
    z = torch.linspace(-9, 9, 501, dtype=torch.float64)
    got = fsq.bound(z[:, None].expand(-1, len(levels)), levels, squash)
    for i, L in enumerate(levels):
        half, offset = (L - 1) * (1 - 1e-3) / 2, 0.5 if L % 2 == 0 else 0.0
        for x, y in zip(z.tolist(), got[:, i].tolist(), strict=True):
            x += math.tan(offset / half)
            squashed = math.tanh(x) if squash == "tanh" else 2 / (1 + math.exp(-1.6 * x)) - 1
            assert y == pytest.approx(squashed * half - offset, abs=1e-12)


@pytest.mark.parametrize("squash", ["tanh", "sigmoid"])
@pytest.mark.parametrize("levels", LEVELS)
def test_rounding_takes_exactly_the_levels(levels, squash):
    z = torch.cat([torch.linspace(-30, 30, 3001), torch.tensor([-1e30, 1e30])])
    digits = fsq.bounded_to_digits(fsq.bound(z[:, None].expand(-1, len(levels)), levels, squash), levels)
    for i, L in enumerate(levels):
        assert digits[:, i].unique().tolist() == list(range(L))
        assert (digits[:3001, i].diff() >= 0).all()


@pytest.mark.parametrize("L", [2, 3, 4, 5, 7, 8])
def test_values_span_minus_one_to_one_or_one_minus_two_over_L(L):
    values = fsq.implied_values([L], torch.float64)
    assert values.min() == -1
    assert values.max() == (1 if L % 2 else 1 - 2 / L)
    assert torch.allclose(values[:, 0].diff(), torch.tensor(1 / (L // 2), dtype=torch.float64))


@pytest.mark.parametrize("levels", LEVELS)
def test_codes_and_digits_are_one_to_one_with_the_first_digit_fastest(levels):
    codes = torch.arange(math.prod(levels))
    digits = fsq.codes_to_digits(codes, levels)
    assert torch.equal(fsq.digits_to_codes(digits, levels), codes)
    assert (digits >= 0).all() and (digits < torch.tensor(levels)).all()
    if len(levels) > 1:
        assert digits[1].tolist() == [1] + [0] * (len(levels) - 1)
    assert torch.equal(fsq.digits_to_values(digits, levels, torch.float64), fsq.implied_values(levels, torch.float64))
    assert len(fsq.implied_values(levels, torch.float64).unique(dim=0)) == len(codes)
