"""Pictures in `.npz` files, each a document: see pixels.py for their bytes.

    one file    arrays named train, valid, test
    a folder    of files named *train*, *val*, each with an array `data`: the official downsampled ImageNet, whose
                rows are all of red, then green, then blue  [Chrabaszcz 1707.08819]

Axes:   N pictures  H height  W width  S side of a square picture
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transformer_vq.config import ConfigError, DataConfig
from transformer_vq.data.documents import Piece, Pieces, cut
from transformer_vq.data.pixels import picture_of, pixel_bytes
from transformer_vq.data.sources import Source, complete, hash_files, split_name, walk

Place = tuple[Path, str]
"""A file and the name of an array in it."""


def holds_arrays(path: Path) -> bool:
    """A `.npz` file, or a folder of nothing else."""
    if path.is_file():
        return path.suffix == ".npz"
    files = [file for file in walk(path, frozenset()) if not file.name.startswith(".")] if path.is_dir() else []
    return bool(files) and all(file.suffix == ".npz" for file in files)


def open_arrays(path: Path, config: DataConfig) -> Source:
    """The splits of a file or folder.  Raises ConfigError when it cannot be read or has no train."""
    root = path if path.is_dir() else path.parent
    files = walk(path, frozenset()) if path.is_dir() else [path]
    places: dict[str, list[Place]] = {}
    for file in files:
        for name in names_in(file):
            split = split_name(file.relative_to(root)) if name == "data" else split_name(Path(name))
            if split is not None:
                places.setdefault(split, []).append((file, name))
    if "train" not in places:
        raise ConfigError(
            f"data.source = {path}: no pictures for train: arrays named train, valid, test are read, or `data` in "
            "files named *train*, *val*"
        )
    found: dict[str, Pieces] = {split: partial(read_arrays, where, config) for split, where in places.items()}
    splits, notes = complete(found, "document")
    fingerprint = f"{hash_files(root, files)} {config.image_size}"
    return Source(f"pictures of {path}", fingerprint, splits, notes)


def names_in(file: Path) -> list[str]:
    """Names of a file's arrays.  Raises ConfigError where it is no `.npz` file."""
    try:
        with np.load(file) as content:
            return list(content.files)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(f"data.source: {file} is not readable as .npz: {error}") from None


def read_arrays(places: list[Place], config: DataConfig) -> Iterator[Piece]:
    """Every picture of some arrays.  Raises ConfigError for an array that holds none."""
    for file, name in places:
        try:
            with np.load(file) as content:
                array = content[name]
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ConfigError(f"data.source: array {name} of {file} is not readable: {error}") from None
        for i, pixels in enumerate(laid_out(array, f"array {name} of {file}")):
            picture = picture_of(pixels)
            assert picture is not None, "laid_out gives pictures"
            yield from cut(pixel_bytes(picture, config.image_size), f"picture {i} of {name} in {file}")


def laid_out(array: NDArray[Any], where: str) -> NDArray[np.uint8]:
    """(N, H, W, 3) or (N, H, W) as it is, (N, 3·S·S) as (N, S, S, 3).  Raises ConfigError for what is no picture."""
    if array.dtype == np.uint8:
        if array.ndim == 3 or (array.ndim == 4 and array.shape[-1] == 3):
            return array
        if array.ndim == 2:
            side = isqrt(array.shape[1] // 3)
            if array.shape[1] == 3 * side * side > 0:
                return array.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
    raise ConfigError(
        f"data.source: {where} is {array.dtype} {array.shape}; pictures are uint8 (N, H, W, 3), (N, H, W) or (N, 3·S·S)"
    )
