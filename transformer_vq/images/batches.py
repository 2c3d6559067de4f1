"""Training batches of pictures, pure in (seed, step): resuming needs no replay.

An epoch is a permutation of its own; batches are cut from the endless row of epochs, so that every picture is seen
equally often whatever the batch size.

Axes:   B batch  C channels  h, w height and width
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transformer_vq.images.pictures import Array, Pictures


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, 0, epoch]).permutation(n)


def positions(n: int, seed: int, step: int, rows: range, batch_size: int) -> NDArray[np.int64]:
    """Which of n pictures are rows `rows` of the batch of `step`."""
    places = [divmod(step * batch_size + row, n) for row in rows]
    return np.array([_epoch(seed, epoch, n)[at] for epoch, at in places], np.int64)


def image_batch(
    pictures: Pictures, seed: int, step: int, rows: range, batch_size: int, flip: bool = False, shift: int = 0
) -> Tensor:
    """Rows `rows` of a step's batch, augmented: (B, C, h, w) uint8.

    flip: mirror half of them.  shift: move by up to so many pixels in both directions, reflected at the edges.
    What happens to a row depends on seed, step and row alone.
    """
    array = pictures.read(positions(len(pictures), seed, step, rows, batch_size))
    if flip or shift:
        draws = np.random.default_rng([seed, 1, step]).random((batch_size, 3))[rows.start : rows.stop : rows.step]
        array = np.stack([augment(picture, draw, flip, shift) for picture, draw in zip(array, draws, strict=True)])
    return torch.from_numpy(np.ascontiguousarray(array))


def augment(picture: Array, draw: NDArray[np.float64], flip: bool, shift: int) -> Array:
    """picture (C, h, w), draw (3,) uniform in [0, 1) -> (C, h, w)."""
    _, height, width = picture.shape
    if shift:
        padded = np.pad(picture, ((0, 0), (shift, shift), (shift, shift)), mode="reflect")
        top, left = (int(u * (2 * shift + 1)) for u in draw[:2])
        picture = padded[:, top : top + height, left : left + width]
    return picture[:, :, ::-1] if flip and draw[2] < 0.5 else picture


def to_unit(pictures: Tensor) -> Tensor:
    """uint8 -> fp32 in [-1, 1], what the networks read."""
    return pictures.float() / 127.5 - 1


def to_bytes(pictures: Tensor) -> Tensor:
    """Networks' output -> uint8, clipped to [0, 255]."""
    return ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
