"""Pictures in `.npz` files. As text, each is a document: see pixels.py for their bytes.

An array's name says in whole words which split it belongs to and what it is: pictures or their labels.

    train, valid, test; train_labels, ...             ours
    train_images, train_labels, val_images, ...       MedMNIST
    x_train, y_train, x_test, y_test                  Keras
    data, labels in files named *train*, *val*        the official downsampled ImageNet, whose rows are all of red, then
                                                      green, then blue  [Chrabaszcz 1707.08819]

Axes:   N pictures  H height  W width  S side of a square picture
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transformer_vq.config import ConfigError, DataConfig
from transformer_vq.data.documents import Piece, Pieces, cut
from transformer_vq.data.npz import array_names, read_array
from transformer_vq.data.pixels import picture_of, pixel_bytes
from transformer_vq.data.sources import SPLIT_WORDS, Source, complete, hash_files, split_name, walk, words_of

PICTURE_WORDS = frozenset({"image", "images", "img", "imgs", "picture", "pictures", "data", "x"})
LABEL_WORDS = frozenset({"label", "labels", "target", "targets", "class", "classes", "y"})
MOST_CLASSES = 1 << 16


class Place(NamedTuple):
    """Pictures of a split in a file, and the array of their labels beside them."""

    file: Path
    pictures: str
    labels: str | None


class Arrays(NamedTuple):
    """What the names in a file or folder say."""

    root: Path
    files: list[Path]
    places: dict[str, list[Place]]
    """By split, train among them."""
    notes: tuple[str, ...]
    """Which arrays are left out."""


def holds_arrays(path: Path) -> bool:
    """A `.npz` file, or a folder of nothing else."""
    return bool(array_files(path)) if path.is_dir() else path.is_file() and path.suffix == ".npz"


def array_files(folder: Path) -> list[Path]:
    """The files of a folder of `.npz` files; none where others lie among them, hidden ones aside."""
    files = [file for file in walk(folder, frozenset()) if not file.name.startswith(".")]
    return files if all(file.suffix == ".npz" for file in files) else []


def find_arrays(path: Path) -> Arrays:
    """The arrays of a file or folder by their names.  Raises ConfigError where they name no train, or one thing twice.

    No array is read.
    """
    root, files = (path, array_files(path)) if path.is_dir() else (path.parent, [path])
    places: dict[str, list[Place]] = defaultdict(list)
    notes, seen = [], []
    for file in files:
        found: dict[tuple[str, str], str] = {}
        names = array_names(file)
        unread = []
        for name in names:
            split, role = split_of(name, file.relative_to(root)), role_of(name)
            if split is None or role is None:
                unread.append(name)
            elif (split, role) in found:
                raise ConfigError(f"data.source: {file}: {found[split, role]} and {name} are both {role} of {split}")
            else:
                found[split, role] = name
        for (split, role), name in found.items():
            if role == "pictures":
                places[split].append(Place(file, name, found.get((split, "labels"))))
            elif (split, "pictures") not in found:
                unread.append(name)
        if unread:
            notes.append(f"left out of {file.name}: {', '.join(unread)}")
        seen += names
    if "train" not in places:
        raise ConfigError(
            f"data.source = {path}: no pictures for train: it holds {', '.join(dict.fromkeys(seen)) or 'nothing'}; "
            "arrays named train, valid, test are read (or x_train, train_images, ...), or `data` in files named "
            "*train*, *val*"
        )
    return Arrays(root, files, dict(places), tuple(notes))


def split_of(name: str, file: Path) -> str | None:
    """The split that an array's name says, else that of its file's path."""
    words = [word for word in words_of(name) if word in SPLIT_WORDS]
    return split_name(Path(name.replace("/", "_"))) if words else split_name(file)


def role_of(name: str) -> str | None:
    """`pictures`, `labels`, or None for a name with other words beside the split's."""
    words = {word for word in words_of(name) if word not in SPLIT_WORDS}
    if words <= PICTURE_WORDS:
        return "pictures"
    return "labels" if words <= LABEL_WORDS | PICTURE_WORDS else None


def open_arrays(path: Path, config: DataConfig) -> Source:
    """The splits of a file or folder as text.  Raises ConfigError when it cannot be read or has no train."""
    arrays = find_arrays(path)
    found: dict[str, Pieces] = {split: partial(read_arrays, where, config) for split, where in arrays.places.items()}
    splits, notes = complete(found, "document")
    fingerprint = f"{hash_files(arrays.root, arrays.files)} {config.image_size}"
    return Source(f"pictures of {path}", fingerprint, splits, (*notes, *arrays.notes))


def read_arrays(places: list[Place], config: DataConfig) -> Iterator[Piece]:
    """Every picture of some arrays.  Raises ConfigError for an array that is damaged or holds none."""
    for file, name, _ in places:
        for i, pixels in enumerate(laid_out(read_array(file, name), f"array {name} of {file}")):
            where = f"picture {i} of {name} in {file}"
            picture = picture_of(pixels, where)
            assert picture is not None, "laid_out gives pictures"
            yield from cut(pixel_bytes(picture, config.image_size), where)


def laid_out(array: NDArray[Any], where: str) -> NDArray[np.uint8]:
    """Pictures as (N, H, W, 3) or (N, H, W); a channel axis may come first, rows (N, 3·S·S) become squares.

    Raises ConfigError, naming `where`, for what is no picture.
    """
    if array.dtype == np.uint8 and array.size:
        if array.ndim == 3:
            return array
        if array.ndim == 4 and (array.shape[3] in (1, 3) or array.shape[1] in (1, 3)):
            last = array if array.shape[3] in (1, 3) else array.transpose(0, 2, 3, 1)
            return last if last.shape[3] == 3 else last[..., 0]
        if array.ndim == 2:
            side = isqrt(array.shape[1] // 3)
            if array.shape[1] == 3 * side * side > 0:
                return array.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
    raise ConfigError(
        f"data.source: {where} is {array.dtype} {array.shape}; pictures are uint8 (N, H, W), with 1 or 3 channels "
        "before or behind H and W, or (N, 3·S·S)"
    )


def classes_of(array: NDArray[Any], count: int, where: str) -> NDArray[np.int64]:
    """The labels of `count` pictures as numbers (N,): whole numbers of any type, from 0 on; (N, 1) will do.

    Raises ConfigError, naming `where`, for other shapes, types and numbers.
    """
    if array.shape not in ((count,), (count, 1)):
        raise ConfigError(f"data.source: {where} {array.shape} do not fit {count} pictures; labels are (N,) or (N, 1)")
    flat = array.reshape(-1)
    if flat.dtype.kind not in "buif" or not (np.isfinite(flat) & (flat == np.floor(flat))).all():
        raise ConfigError(f"data.source: {where}, {flat.dtype}, are no labels: whole numbers from 0 on are read")
    low, high = (flat.min(), flat.max()) if count else (0, 0)
    if low < 0 or high >= MOST_CLASSES:
        raise ConfigError(f"data.source: {where} go from {low} to {high}; labels are from 0 to {MOST_CLASSES - 1}")
    return flat.astype(np.int64)
