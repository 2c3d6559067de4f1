"""Pictures of a dataset, read through `datasets`: of the Hugging Face hub, or a local folder.

Columns are found by their type: pictures (decoded by data/pictures.py, as everywhere), structs of their bytes, or
arrays of pixels; labels are of type ClassLabel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from transformer_vq.config import ConfigError
from transformer_vq.config.explain import one_line, some
from transformer_vq.config.images import ImageDataConfig
from transformer_vq.data.pictures import header
from transformer_vq.data.pixels import content_of, picture_of
from transformer_vq.data.sources import SPLIT_WORDS
from transformer_vq.images.pictures import Alike, Prepare
from transformer_vq.images.sources.folder import load
from transformer_vq.images.sources.found import Found


class Columns(NamedTuple):
    """Where pictures and labels are, and how a picture is kept."""

    picture: str
    label: str | None
    is_array: bool
    others: list[str]
    """More columns of pictures, left out."""


def from_dataset(name: str, config: ImageDataConfig) -> Found:
    """The splits of a dataset.  Raises ConfigError where it is out of reach or holds no pictures."""
    import datasets
    from datasets.exceptions import DatasetsError

    path, subset = dataset_name(name)
    try:
        loaded = datasets.load_dataset(path, subset)
    except (DatasetsError, OSError, ValueError) as error:  # offline, unknown, gated, no such subset
        reason = one_line(error.__cause__ or error)
        raise ConfigError(f"data.source = {config.source}: dataset {name} cannot be had: {reason}") from None
    alike = Alike(config.source, config.size, config.channels)
    given: dict[str, str] = {}
    rows_of: dict[str, tuple[Any, Columns]] = {}
    notes: list[str] = []
    unnamed = [str(split) for split in loaded if str(split).lower() not in SPLIT_WORDS]
    for split in loaded:
        kind = SPLIT_WORDS.get(str(split).lower())
        if kind is None:
            continue
        if kind in given:
            raise ConfigError(f"data.source = {config.source}: {given[kind]} and {split} are both {kind}")
        given[kind] = str(split)
        columns = find_columns(loaded[split].features, config.source)
        rows = (
            loaded[split].with_format("numpy", columns=[columns.picture], dtype=np.uint8)
            if columns.is_array
            else loaded[split]
        )
        if isinstance(rows.features[columns.picture], datasets.Image):
            rows = rows.cast_column(columns.picture, datasets.Image(decode=False))
        rows_of[kind] = rows, columns
        for i in range(len(rows)) if config.size is None or config.channels is None else range(min(len(rows), 1)):
            alike.show(f"{split}[{i}]", *_header(rows[i][columns.picture], f"{split}[{i}]"))
        if columns.others and not notes:
            notes.append(f"pictures are column {columns.picture}; left out: {some(columns.others)}")
    if not given:
        raise ConfigError(f"data.source = {config.source}: no split train; the dataset has {', '.join(unnamed)}")
    if unnamed:
        notes.append(f"splits left out: {some(unnamed)}")
    shape = alike.shape()
    prepare = Prepare(shape.channels, config.size)
    splits = {}
    for kind, (rows, columns) in rows_of.items():
        known = [] if columns.label is None else list(loaded[given[kind]][columns.label])
        labels = np.array([-1 if label is None else label for label in known], np.int64) if known else None
        openers = [_opener(rows, columns.picture, i, f"{given[kind]}[{i}]") for i in range(len(rows))]
        splits[kind] = load(openers, prepare, shape, labels)
    fingerprints = "".join(loaded[split]._fingerprint for split in given.values())
    return Found(name, splits, shape, hashlib.sha256(fingerprints.encode()).hexdigest(), tuple(notes))


def dataset_name(name: str) -> tuple[str, str | None]:
    """NAME or NAME/CONFIG, where NAME is a local folder, OWNER/DATASET or DATASET."""
    if Path(name).expanduser().exists():
        return str(Path(name).expanduser()), None
    parts = name.split("/")
    return ("/".join(parts[:2]), parts[2]) if len(parts) == 3 else (name, None)


def find_columns(features: Any, source: str) -> Columns:
    """The first column of pictures, and of labels.  Raises ConfigError where there are no pictures."""
    import datasets

    arrays = (datasets.Array2D, datasets.Array3D)
    pictures = [
        name
        for name, kind in features.items()
        if isinstance(kind, datasets.Image)
        or (isinstance(kind, arrays) and kind.dtype == "uint8")
        or (isinstance(kind, dict) and kind.keys() == {"bytes", "path"})
    ]
    if not pictures:
        raise ConfigError(f"data.source = {source}: no column of pictures among {', '.join(features)}")
    label = next((name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    return Columns(pictures[0], label, isinstance(features[pictures[0]], arrays), pictures[1:])


def _header(value: Any, where: str) -> tuple[int, tuple[int, int]]:
    """Channels and (width, height) of a row's picture."""
    if isinstance(value, dict):
        return header(content_of(value, where), where)
    picture = _picture(value, where)
    return len(picture.getbands()), picture.size


def _picture(value: Any, where: str) -> Image.Image:
    picture = None if value is None else picture_of(value, where)
    if picture is None:
        kind = "nothing" if value is None else type(value).__name__
        raise ConfigError(f"data.source: {where} holds {kind}, no picture; arrays are uint8 (H, W, 3) or (H, W)")
    return picture


def _opener(rows: Any, column: str, i: int, where: str) -> Callable[[], Image.Image]:
    return lambda: _picture(rows[i][column], where)
