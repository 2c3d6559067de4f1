"""Numbers that are arithmetic on counters."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from transformer_vq.ops import counter


def states(seed: int = 5, rows: int = 20, places: int = 30, first_row: int = 0) -> torch.Tensor:
    return counter.token_states(torch.tensor(seed), first_row + torch.arange(rows), torch.arange(places))


def splitmix64(x: int) -> int:
    """Steele's finalizer in exact integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_bits_are_the_formula_in_exact_integers():
    gamma = 0x9E3779B97F4A7C15
    got = counter.bits(states(rows=2, places=3)[..., None], torch.arange(4))
    for row in range(2):
        for place in range(3):
            token = splitmix64((5 + gamma) % 2**64)
            token = splitmix64((token + (row + 1) * gamma) % 2**64)
            token = splitmix64((token + (place + 1) * gamma) % 2**64)
            want = [splitmix64((token + (entry + 1) * gamma) % 2**64) for entry in range(4)]
            assert [int(x) % 2**64 for x in got[row, place]] == want


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_numbers_have_their_distribution_and_are_independent(kind):
    numbers = torch.stack(
        [getattr(counter, kind)(counter.bits(states(s)[..., None], torch.arange(25))) for s in (1, 2)]
    )
    assert numbers.isfinite().all()
    assert stats.kstest(numbers.flatten(), {"uniform": "uniform", "normal": "norm"}[kind]).pvalue > 0.01
    for axis in range(4):  # seed (a step, a layer), row, place, entry
        each = numbers.movedim(axis, 0).flatten(1)
        correlation = torch.corrcoef(each)[~torch.eye(len(each), dtype=torch.bool)]
        assert correlation.abs().max() < 6 / each.shape[1] ** 0.5


def test_extremes_are_finite():
    ends = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    assert counter.normal(ends).isfinite().all()
    assert (counter.uniform(ends) > 0).all() and (counter.uniform(ends) < 1).all()


def test_a_row_is_bit_for_bit_the_same_wherever_it_lies():
    entries = torch.arange(37)
    whole = counter.normal(counter.bits(states()[..., None], entries))
    for row in (0, 7, 19):
        alone = counter.normal(counter.bits(states(rows=1, first_row=row)[..., None], entries))
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("width", [1, 6, 64])
def test_dropout_keeps_the_mean(p, width):
    x = torch.ones(200, 50, width, dtype=torch.float64)
    out = counter.drop(x, p, states(rows=200, places=50))
    kept = out[out > 0]
    n = x.numel()
    assert abs(len(kept) - (1 - p) * n) <= 5 * (p * (1 - p) * n) ** 0.5
    assert torch.allclose(kept, kept.new_tensor(1 / max(1 - p, 1e-9)), rtol=1e-3)
    assert torch.equal(counter.drop(x[3:4], p, states(rows=200, places=50)[3:4]), out[3:4])
