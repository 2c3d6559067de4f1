"""Pictures that are arrays already: `.npz` and idx files, scikit-learn's digits."""

from __future__ import annotations

import gzip
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from transformer_vq.config import ConfigError
from transformer_vq.config.explain import one_line, some
from transformer_vq.config.extras import need
from transformer_vq.config.images import ImageDataConfig
from transformer_vq.data.arrays import Place, classes_of, find_arrays
from transformer_vq.data.npz import read_array
from transformer_vq.data.sources import walk
from transformer_vq.images.pictures import Alike, InMemory, Pictures, Prepare, from_array, to_image
from transformer_vq.images.sources.found import Found, hash_contents

IDX = {"train": "train", "t10k": "test", "test": "test"}
Labelled = tuple[NDArray[np.uint8], NDArray[np.int64] | None]
"""(N, C, h, w), and (N,)."""


def digits(config: ImageDataConfig, *notes: str) -> Found:
    """scikit-learn's 8x8 digits."""
    raw = need("sklearn.datasets", f"data.source = {config.source}").load_digits()
    array = np.round(raw.images * (255 / 16)).astype(np.uint8)  # 17 grey levels
    splits = {"train": (from_array(array, "digits"), raw.target.astype(np.int64))}
    return _alike("scikit-learn digits", splits, hashlib.sha256(array.tobytes()).hexdigest(), config, notes)


def from_npz(path: Path, config: ImageDataConfig) -> Found:
    """A `.npz` file, or a folder of them; see data/arrays.py for the names.  Raises ConfigError."""
    arrays = find_arrays(path)
    splits: dict[str, Labelled] = {}
    notes = list(arrays.notes)
    for split, places in arrays.places.items():
        parts = [_read(place, notes) for place in places]
        pictures, labels = [part[0] for part in parts], [part[1] for part in parts if part[1] is not None]
        if len({part.shape[1:] for part in pictures}) > 1:
            shapes = ", ".join(f"{place.file.name} {part.shape}" for place, part in zip(places, pictures, strict=True))
            raise ConfigError(f"data.source = {path}: the pictures of {split} differ: {shapes}")
        whole = pictures[0] if len(pictures) == 1 else np.concatenate(pictures)
        splits[split] = (whole, np.concatenate(labels) if len(labels) == len(parts) else None)
    sha256 = hash_contents(arrays.root, arrays.files)
    return _alike(path.stem if path.is_file() else path.name, splits, sha256, config, notes)


def _read(place: Place, notes: list[str]) -> Labelled:
    file, name, beside = place
    pictures = from_array(read_array(file, name), f"array {name} of {file}")
    if beside is None:
        return pictures, None
    labels, where = read_array(file, beside), f"array {beside} of {file}"
    if labels.ndim == 2 and labels.shape[1] > 1 and len(labels) == len(pictures):
        notes.append(f"{beside} of {file.name} has {labels.shape[1]} labels a picture: not used, a class is one number")
        return pictures, None
    return pictures, classes_of(labels, len(pictures), where)


def idx_files(folder: Path) -> dict[str, Path]:
    """Image files by split, named like train-images-idx3-ubyte.gz."""
    return {
        IDX[name]: path
        for path in sorted(folder.glob("*-images[-.]idx3-ubyte*"))
        if (name := path.name.partition("-images")[0]) in IDX
    }


def from_idx(name: str, folder: Path, config: ImageDataConfig) -> Found:
    """A folder of idx files, as MNIST has them.  Raises ConfigError, naming what is damaged or does not fit."""
    splits: dict[str, Labelled] = {}
    used = []
    for split, path in idx_files(folder).items():
        beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
        pictures = from_array(read_idx(path), str(path))
        labels = classes_of(read_idx(beside), len(pictures), str(beside)) if beside.is_file() else None
        splits[split] = (pictures, labels)
        used += [path, beside] if labels is not None else [path]
    unread = [file.name for file in walk(folder, frozenset()) if file not in used and not file.name.startswith(".")]
    notes = [f"left out of {folder.name}: {some(unread)}"] if unread else []
    return _alike(name, splits, hash_contents(folder, used), config, notes)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An idx file of unsigned bytes, gzipped or not.  Raises ConfigError where it is not one, damaged or cut short."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except Exception as error:  # gzip, zlib and struct have types of their own for a damaged byte
        reason = one_line(error) or type(error).__name__
        raise ConfigError(f"data.source: {path} is not readable: {reason}") from None
    dimensions = raw[3] if len(raw) > 3 else 0
    shape = tuple(np.frombuffer(raw[4 : 4 + 4 * dimensions][: (len(raw) - 4) // 4 * 4], ">u4").tolist())
    body = raw[4 + 4 * dimensions :]
    if raw[:3] != b"\0\0\x08" or len(shape) != dimensions or len(body) != math.prod(shape):
        raise ConfigError(f"data.source: {path} is not a whole idx file of unsigned bytes")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _alike(
    name: str,
    splits: Mapping[str, Labelled],
    sha256: str,
    config: ImageDataConfig,
    notes: tuple[str, ...] | list[str],
) -> Found:
    alike = Alike(config.source, config.size, config.channels)
    for split, (array, _) in splits.items():
        alike.show(split, array.shape[1], (array.shape[3], array.shape[2]))
    shape = alike.shape()
    prepare = Prepare(shape.channels, config.size)
    out: dict[str, Pictures] = {}
    for split, (array, labels) in splits.items():
        fits = array.shape[1:] == tuple(shape)
        out[split] = InMemory(array if fits else np.stack([prepare(to_image(a)) for a in array]), labels)
    return Found(name, out, shape, sha256, tuple(notes))
