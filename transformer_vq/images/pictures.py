"""Pictures as uint8 arrays of one shape: in memory where they fit, else read when they are needed.

What a file's pixels are, data/pictures.py decides, for the language model too; how they are resized is decided here.

Axes:   n pictures  C channels (1 grey, 3 colour)  h, w height and width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from transformer_vq.config import ConfigError
from transformer_vq.config.explain import printable
from transformer_vq.data.arrays import laid_out
from transformer_vq.data.pictures import SUFFIXES

Array = NDArray[np.uint8]
IN_MEMORY = 2 << 30
"""Bytes of pictures of a split that are kept in memory; what is larger is read batch by batch."""


class Shape(NamedTuple):
    """Of every picture."""

    channels: int
    height: int
    width: int

    @property
    def bytes(self) -> int:
        """Of one picture."""
        return self.channels * self.height * self.width

    def __str__(self) -> str:
        return f"{self.height}x{self.width} {'grey' if self.channels == 1 else 'colour'}"


class Pictures(Protocol):
    """One split."""

    @property
    def labels(self) -> NDArray[np.int64] | None: ...

    def __len__(self) -> int: ...

    def read(self, index: NDArray[np.int64]) -> Array:
        """(n,) positions -> (n, C, h, w)."""
        ...


@dataclass(frozen=True)
class InMemory:
    """Pictures that are there already."""

    array: Array
    """(n, C, h, w)."""
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.array)

    def read(self, index: NDArray[np.int64]) -> Array:
        """(n,) positions -> (n, C, h, w)."""
        return self.array[index]


@dataclass(frozen=True)
class OnDemand:
    """Pictures that are opened when they are needed, several threads at a time."""

    openers: Sequence[Callable[[], Image.Image]]
    prepare: Callable[[Image.Image], Array]
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.openers)

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(thread_name_prefix="pictures")

    def read(self, index: NDArray[np.int64]) -> Array:
        """(n,) positions -> (n, C, h, w)."""
        return np.stack(list(self._threads.map(lambda i: self.prepare(self.openers[i]()), index)))


@dataclass(frozen=True)
class Selected:
    """Some of the pictures of another split."""

    whole: Pictures
    index: NDArray[np.int64]

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Of the selected ones."""
        return None if self.whole.labels is None else self.whole.labels[self.index]

    def __len__(self) -> int:
        return len(self.index)

    def read(self, index: NDArray[np.int64]) -> Array:
        """(n,) positions -> (n, C, h, w)."""
        return self.whole.read(self.index[index])


@dataclass(frozen=True)
class Prepare:
    """A picture as an array: converted to `channels`, resized so that the shorter side is `size`, cut at the centre.

    By a bicubic filter, as image benchmarks have it; pictures as text take the box filter of the downsampled ImageNet
    (data/pixels.py).
    """

    channels: int
    size: int | None

    def __call__(self, image: Image.Image) -> Array:
        """-> (C, h, w)."""
        image = image.convert("L" if self.channels == 1 else "RGB")
        if self.size is not None and image.size != (self.size, self.size):
            factor = self.size / min(image.size)
            wide, high = (max(self.size, round(side * factor)) for side in image.size)
            image = image.resize((wide, high), Image.Resampling.BICUBIC)
            left, top = (wide - self.size) // 2, (high - self.size) // 2
            image = image.crop((left, top, left + self.size, top + self.size))
        array = np.asarray(image)
        return array[None] if self.channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


@dataclass
class Alike:
    """Checks that pictures can be made alike, from their size and channels alone, and finds the shape they get.

    Every picture is shown once; the first that does not fit raises ConfigError, naming it and one that came before.
    """

    source: str
    size: int | None
    channels: int | None
    first: tuple[str, int, tuple[int, int]] | None = field(default=None, init=False)

    def show(self, name: str, found: int, size: tuple[int, int]) -> None:
        """One picture: its channels, and (width, height)."""
        channels, name = self.channels or found, printable(name)
        if self.first is None:
            self.first = (name, channels, size)
        other, seen, other_size = self.first
        if channels != seen:
            grey, colour = (name, other) if channels == 1 else (other, name)
            raise ConfigError(
                f"data.source = {self.source}: {grey} is grey and {colour} is in colour; set data.channels to 1 or 3"
            )
        if self.size is None and size != other_size:
            raise ConfigError(
                f"data.source = {self.source}: pictures differ in size, {other} has {_size(other_size)} and {name} "
                f"{_size(size)}; set data.size"
            )

    def shape(self) -> Shape:
        """Of all pictures, once made alike.  Raises ConfigError when none was shown."""
        if self.first is None:
            raise ConfigError(f"data.source = {self.source}: no pictures there ({', '.join(sorted(SUFFIXES))})")
        _, channels, (width, height) = self.first
        return Shape(channels, self.size or height, self.size or width)


def from_array(array: NDArray[Any], where: str) -> Array:
    """Pictures as arrays.py reads them -> (N, C, h, w).  Raises ConfigError, naming `where`, for others."""
    pictures = laid_out(array, where)
    return pictures[:, None] if pictures.ndim == 3 else np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))


def to_image(array: Array) -> Image.Image:
    """(C, h, w) -> a PIL picture."""
    return Image.fromarray(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0))


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"
