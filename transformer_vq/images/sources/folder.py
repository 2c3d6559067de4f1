"""Pictures below a folder, with splits and labels by the names of the folders around them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from transformer_vq.config import ConfigError
from transformer_vq.config.explain import some
from transformer_vq.config.images import ImageDataConfig
from transformer_vq.data.pictures import header, is_picture, open_picture
from transformer_vq.data.sources import explore, split_name
from transformer_vq.images.pictures import IN_MEMORY, Alike, InMemory, OnDemand, Pictures, Prepare, Shape
from transformer_vq.images.sources.found import Found, hash_contents, hash_sizes, path_bytes


class Placed(NamedTuple):
    """Pictures by split, the names of the folders around each that are no split's, and what was decided."""

    files: dict[str, list[Path]]
    folders: dict[str, list[tuple[str, ...]]]
    notes: tuple[str, ...]


def from_folder(folder: Path, config: ImageDataConfig) -> Found:
    """Every picture below a folder; see `place` for splits and labels.  Raises ConfigError."""
    files, others, met_twice = picture_files(folder)
    alike = Alike(str(folder), config.size, config.channels)
    for path in files:
        found = header(path, str(path), upright=config.size is None)
        alike.show(path.relative_to(folder).as_posix(), found.channels, found.size)
    if not files and others:
        raise ConfigError(
            f"data.source = {folder}: no pictures there, but {some(others)}; parquet is named hf:{folder}"
        )
    shape = alike.shape()
    placed = place(folder, files)
    labels, unlabelled = folder_labels(placed.folders)
    prepare = Prepare(shape.channels, config.size)
    splits = {
        split: load([opener(path) for path in paths], prepare, shape, labels[split])
        for split, paths in placed.files.items()
    }
    whole = all(isinstance(split, InMemory) for split in splits.values())
    sha256 = hash_contents(folder, files) if whole else hash_sizes(folder, files)
    notes = placed.notes + unlabelled + met_twice
    notes += (f"left out, no pictures: {some(others)}",) if others else ()
    hashes = [hashlib.sha256(path_bytes(path.relative_to(folder))).hexdigest()[:8] for path in files]
    keys = np.array([int(digits, 16) for digits in hashes], np.int64)
    return Found(str(folder), splits, shape, sha256, notes, lambda n: keys)


def picture_files(folder: Path) -> tuple[list[Path], list[str], tuple[str, ...]]:
    """Every picture below a folder, in the order of their relative paths; the names of the files that are none; notes.

    Hidden files are neither. Links are followed, each content once.
    """
    found = explore(folder, frozenset())
    visible = [path for path in found.files if not path.name.startswith(".")]
    pictures = [path for path in visible if is_picture(path)]
    others = sorted(path.relative_to(folder).as_posix() for path in set(visible) - set(pictures))
    return sorted(pictures, key=lambda path: path.relative_to(folder).as_posix()), others, found.notes


def place(root: Path, files: list[Path]) -> Placed:
    """Splits by the names of folders, or else of all files; else one split, which a hash of the paths divides.

    The outermost folder with a split's word decides (Train/, my-test-set/, cat/valid/). Where some name train and
    others valid or test, a picture in none of them is a refusal. A single folder `train` beside others is a class.
    """
    relative = [path.relative_to(root) for path in files]
    named = [split_name(path.parent) for path in relative]
    splits = {split for split in named if split}
    if "train" in splits and len(splits) > 1:
        astray = [path.as_posix() for path, split in zip(relative, named, strict=True) if split is None]
        if astray:
            raise ConfigError(
                f"data.source = {root}: {some(astray)} would be left out: the folders name "
                f"{', '.join(sorted(splits))}, and these are in none of them"
            )
        note = "split by the names of the folders"
        return _placed(files, named, [_labels_below_split(path) for path in relative], note)
    if len(splits) > 1:
        raise ConfigError(f"data.source = {root}: the folders name {' and '.join(sorted(splits))}, and no train")
    labels = [path.parent.parts for path in relative]
    if splits and None not in named:  # one split around everything is no class
        return _placed(files, ["train"] * len(files), [_labels_below_split(path) for path in relative], None)
    by_file = [split_name(Path(path.name)) for path in relative]
    words = {split for split in by_file if split}
    if not splits and "train" in words and len(words) > 1:
        if None not in by_file:
            return _placed(files, by_file, labels, "split by the names of the files")
        count = sum(split is None for split in by_file)
        note = f"the names of {len(files) - count:,} of {len(files):,} files say a split, so none is taken by its name"
        return _placed(files, ["train"] * len(files), labels, note)
    kind = f"the folder named for {splits.pop()} is a class among others" if splits else None
    return _placed(files, ["train"] * len(files), labels, kind)


def _placed(
    files: list[Path], splits: list[str | None] | list[str], labels: list[tuple[str, ...]], note: str | None
) -> Placed:
    by_split: dict[str, list[Path]] = {}
    folders: dict[str, list[tuple[str, ...]]] = {}
    for path, split, names in zip(files, splits, labels, strict=True):
        assert split is not None, "every picture has a split here"
        by_split.setdefault(split, []).append(path)
        folders.setdefault(split, []).append(names)
    return Placed(by_split, folders, (note,) if note else ())


def _labels_below_split(path: Path) -> tuple[str, ...]:
    """The folders around a picture without the one that names its split."""
    parts = path.parent.parts
    at = next(i for i, part in enumerate(parts) if split_name(Path(part)))
    return parts[:at] + parts[at + 1 :]


def folder_labels(
    folders: Mapping[str, list[tuple[str, ...]]],
) -> tuple[dict[str, NDArray[np.int64] | None], tuple[str, ...]]:
    """Numbers of the folders around the pictures; None where some picture has no folder or all have the same."""
    every = [names for split in folders.values() for names in split]
    number = {name: i for i, name in enumerate(sorted({"/".join(names) for names in every}))}
    if len(number) < 2:
        return dict.fromkeys(folders), ()
    if not all(every):
        loose = sum(not names for names in every)
        return dict.fromkeys(folders), (f"labels are not used: {loose:,} pictures are in no folder of a class",)
    numbers = {split: [number["/".join(names)] for names in rows] for split, rows in folders.items()}
    return {split: np.array(rows, np.int64) for split, rows in numbers.items()}, ()


def opener(path: Path) -> Callable[[], Image.Image]:
    """Reads the picture when it is called."""
    return lambda: open_picture(path, str(path))


def load(
    openers: list[Callable[[], Image.Image]], prepare: Prepare, shape: Shape, labels: NDArray[np.int64] | None
) -> Pictures:
    """Read now where they fit, so that an unreadable one is heard of now; else when they are needed."""
    pictures = OnDemand(openers, prepare, labels)
    if len(openers) * shape.bytes > IN_MEMORY:
        return pictures
    return InMemory(pictures.read(np.arange(len(openers))), labels)
