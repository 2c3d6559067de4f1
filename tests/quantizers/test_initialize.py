"""First codebooks from keys."""

from __future__ import annotations

import pytest
import torch

from transformer_vq.ops.nearest import lookup, nearest_code
from transformer_vq.quantizers.initialize import kmeans, sample_keys


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def distortion(keys, centres):
    return (keys - lookup(centres, nearest_code(keys[None], centres))[0]).square().sum(-1).mean(-1)


def test_kmeans_finds_well_separated_clusters_in_every_head():
    centres = 100 * torch.randn(3, 5, 4, generator=seeded(1))
    order = torch.randperm(200, generator=seeded(3))
    keys = (centres[:, torch.arange(200) % 5] + torch.randn(3, 200, 4, generator=seeded(2)))[:, order]
    found = min((kmeans(keys, 5, seeded(s)) for s in range(20)), key=lambda c: distortion(keys, c).sum())
    assert (torch.cdist(found, centres).min(-1).values < 1).all()


def test_kmeans_is_no_worse_than_its_start_and_repeats():
    keys = torch.randn(2, 400, 6, generator=seeded(1))
    generator = seeded()
    sampled = sample_keys(keys, 400, generator)  # the same two draws as inside
    start = sample_keys(sampled, 16, generator)
    found = kmeans(keys, 16, seeded())
    assert (distortion(keys, found) < 0.9 * distortion(keys, start)).all()
    assert torch.equal(found, kmeans(keys, 16, seeded()))
    assert not torch.equal(found, kmeans(keys, 16, seeded(1)))


def test_kmeans_is_a_fixed_point_of_itself_on_few_distinct_keys():
    """Equal keys leave centres without keys: those stay where they were, and nothing is NaN."""
    keys = torch.ones(1, 20, 3)
    assert torch.equal(kmeans(keys, 4, seeded()), torch.ones(1, 4, 3))


def test_kmeans_by_angle():
    angles = torch.tensor([0.0, 1.5, 3.0]).repeat(30)
    lengths = torch.rand(90, generator=seeded()) + 0.5
    keys = (lengths * torch.stack([angles.cos(), angles.sin()])).T[None]
    best = max(
        torch.cosine_similarity(keys[0][:, None], kmeans(keys, 3, seeded(s), "cosine")[0][None], dim=-1)
        .max(-1)
        .values.min()
        for s in range(20)
    )
    assert best > 0.999


def test_sampled_keys_are_different_keys():
    keys = torch.arange(40.0).view(2, 20, 1)
    rows = sample_keys(keys, 20, seeded())
    assert torch.equal(rows.sort(1).values, keys)


def test_too_few_keys():
    with pytest.raises(ValueError, match="3 keys a head are fewer than 4 codes"):
        sample_keys(torch.zeros(1, 3, 2), 4, seeded())
