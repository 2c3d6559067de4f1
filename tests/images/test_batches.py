from __future__ import annotations

import numpy as np
import pytest
import torch

from transformer_vq.images.batches import augment, image_batch, positions, to_bytes, to_unit
from transformer_vq.images.pictures import InMemory

PICTURES = InMemory(np.random.default_rng(0).integers(256, size=(10, 1, 6, 6), dtype=np.uint8))


def test_every_picture_is_seen_equally_often_across_epochs():
    seen = np.concatenate([positions(10, 3, step, range(4), 4) for step in range(15)])
    assert np.bincount(seen, minlength=10).tolist() == [6] * 10
    first, second = seen[:10], seen[10:20]
    assert sorted(first) == sorted(second) == list(range(10)) and first.tolist() != second.tolist()


@pytest.mark.parametrize("settings", [{}, {"flip": True, "shift": 2}])
def test_rows_do_not_depend_on_who_reads_them(settings):
    whole = image_batch(PICTURES, 1, 7, range(8), 8, **settings)
    parts = torch.cat([image_batch(PICTURES, 1, 7, rows, 8, **settings) for rows in (range(3), range(3, 8))])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, image_batch(PICTURES, 2, 7, range(8), 8, **settings))


def test_augmentation_moves_and_mirrors():
    picture = np.arange(16, dtype=np.uint8).reshape(1, 4, 4)
    assert np.array_equal(augment(picture, np.array([0.5, 0.5, 0.9]), True, 1), picture)  # the middle, not mirrored
    assert np.array_equal(augment(picture, np.array([0.5, 0.5, 0.1]), True, 1), picture[:, :, ::-1])
    moved = augment(picture, np.array([0.0, 0.5, 0.9]), True, 1)  # one down: the first row is a reflection
    assert np.array_equal(moved[0, 1:], picture[0, :3]) and np.array_equal(moved[0, 0], picture[0, 1])


def test_bytes_survive_the_way_through_the_range_of_the_networks():
    raw = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(to_unit(raw)), raw)
    assert to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
