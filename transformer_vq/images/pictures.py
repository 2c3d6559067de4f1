"""Pictures as uint8 arrays of one shape: in memory where they fit, else read when they are needed.

Axes:   n pictures  C channels (1 grey, 3 colour)  h, w height and width
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from transformer_vq.config import ConfigError

Array = NDArray[np.uint8]
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"})
GREY_MODES = frozenset({"L", "LA", "La", "1"})
COLOUR_MODES = frozenset({"RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"})
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
    """A picture as an array: converted to `channels`, resized so that the shorter side is `size`, cut at the centre."""

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
    """Checks that pictures can be made alike, from their size and mode alone, and finds the shape they get.

    Every picture is shown once; the first that does not fit raises ConfigError, naming it and one that came before.
    """

    source: str
    size: int | None
    channels: int | None
    first: tuple[str, int, tuple[int, int]] | None = field(default=None, init=False)

    def show(self, name: str, mode: str, size: tuple[int, int]) -> None:
        """One picture: PIL's mode, and (width, height)."""
        if mode not in GREY_MODES | COLOUR_MODES:
            raise ConfigError(
                f"data.source = {self.source}: {name} has pixels of mode {mode}; 8-bit grey or colour is read"
            )
        channels = self.channels or (1 if mode in GREY_MODES else 3)
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


def open_picture(path: Path) -> Image.Image:
    """A picture, decoded.  Raises ConfigError with the file's name where it cannot be."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"data.source: {path} is not a readable picture: {error}") from None


def header(path: Path) -> tuple[str, tuple[int, int]]:
    """Mode and (width, height) of a picture, without decoding it.  Raises ConfigError with the file's name."""
    try:
        with Image.open(path) as image:
            return image.mode, image.size
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"data.source: {path} is not a readable picture: {error}") from None


def picture_files(folder: Path) -> list[Path]:
    """Every picture below a folder, hidden ones aside, in the order of their relative paths."""
    found: Iterable[Path] = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    visible = (p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    return sorted(visible, key=lambda p: p.relative_to(folder).as_posix())


def from_array(array: NDArray[Any], name: str, source: str) -> Array:
    """Arrays (n, h, w), (n, h, w, C) or (n, C, h, w) of uint8 -> (n, C, h, w).  Raises ConfigError for others."""
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or 0 in array.shape:
        raise ConfigError(
            f"data.source = {source}: {name} is {array.dtype} of shape {array.shape}; "
            "pictures are uint8 (n, h, w), (n, h, w, channels) or (n, channels, h, w)"
        )
    if array.ndim == 3:
        return array[:, None]
    if array.shape[3] in (1, 3):
        return np.ascontiguousarray(array.transpose(0, 3, 1, 2))
    if array.shape[1] in (1, 3):
        return array
    raise ConfigError(f"data.source = {source}: {name} of shape {array.shape} has no axis of 1 or 3 channels")


def to_image(array: Array) -> Image.Image:
    """(C, h, w) -> a PIL picture."""
    return Image.fromarray(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0))


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"
