"""Numbers that follow from a seed and a place."""

from __future__ import annotations

import torch
from scipy import stats

from transformer_vq.models.dropout import lasting_uniform


def splitmix64(x: int) -> int:
    """Steele's finalizer in exact integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_numbers_are_splitmix64():
    gamma, draws, places = 0x9E3779B97F4A7C15, [1, 2**61 + 12345], [-2, -1, 0, 1, 10**6]
    for layer in (0, 7, 95):
        got = lasting_uniform(torch.tensor(draws)[:, None], layer, torch.tensor(places))
        for row, draw in zip(got.tolist(), draws, strict=True):
            stirred = splitmix64((draw + (layer + 1) * (gamma - 2**64) % 2**63) % 2**64)
            want = [(splitmix64((stirred + place * gamma) % 2**64) >> 40) / 2**24 for place in places]
            assert row == want


def test_numbers_are_uniform_and_differ_by_draw_layer_and_place():
    draws = torch.randint(1, 2**62, (100,), generator=torch.Generator().manual_seed(0))
    numbers = torch.stack([lasting_uniform(draws[:, None], layer, torch.arange(-2, 98)) for layer in range(10)])
    assert stats.kstest(numbers.flatten(), "uniform").pvalue > 0.01
    for axis in range(3):
        rows = numbers.movedim(axis, 0).flatten(1)
        correlation = torch.corrcoef(rows)[~torch.eye(len(rows), dtype=torch.bool)]
        assert correlation.abs().max() < 6 / rows.shape[1] ** 0.5
