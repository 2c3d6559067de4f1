"""The rows of a dataset of the library `datasets` as documents.

They are read in batches, and reading can begin at any of them: so a process goes on where another was killed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from transformer_vq.config import ConfigError, DataConfig
from transformer_vq.config.explain import one_line
from transformer_vq.data.documents import Piece, cut
from transformer_vq.data.pixels import picture_of, pixel_bytes
from transformer_vq.data.places import Place

if TYPE_CHECKING:
    from datasets import DatasetBuilder

ROWS = 1000
"""Rows that are read at once."""


class Rows:
    """The rows of a dataset's splits, one after another, as documents; a `Stream`, whose places are batches.

    With `data.shuffle` a batch has so many rows, and they come in a random order, always the same.
    """

    def __init__(self, builder: DatasetBuilder, splits: Sequence[str], config: DataConfig) -> None:
        self.builder, self.splits, self.config = builder, splits, config
        self.place: Place | None = None

    def before(self, place: Place) -> int | None:
        """See `Stream`."""
        return place.bytes if place.at["split"] in self.splits else None

    def __call__(self, place: Place | None = None) -> Iterator[Piece]:
        """See `Stream`.  Raises ConfigError for a column that is not there, no text and no picture."""
        begin, read = (self.splits[0], 0) if place is None else (place.at["split"], place.bytes)
        for split in self.splits[self.splits.index(begin) :]:
            start = (place.at["row"], place.at["state"]) if place is not None and split == begin else (0, None)
            for first, state, values in batches(self.builder, split, self.config, *start):
                self.place = Place({"split": split, "row": first, "state": state}, read)
                for i in self._order(first, len(values)):
                    text = text_of(values[i], split, first + i, self.config)
                    read += len(text)
                    yield from cut(text, f"row {first + i} of {split}")

    def _order(self, first: int, count: int) -> Sequence[int]:
        if self.config.shuffle is None:
            return range(count)
        order: list[int] = np.random.default_rng([0, first]).permutation(count).tolist()
        return order


def batches(
    builder: DatasetBuilder, split: str, config: DataConfig, first: int, state: Any
) -> Iterator[tuple[int, Any, Sequence[Any]]]:
    """Values of the column, some at a time: number of the first row, what a streaming dataset needs to begin there
    (JSON; None: it begins at its start), values. From row `first` on, with its state.

    What goes wrong in reading becomes a ConfigError.
    """
    from datasets import Array2D, Array3D, Image
    from datasets.exceptions import DatasetsError

    field, streaming = config.field, config.streaming
    try:
        if not streaming:
            builder.download_and_prepare()
        rows = builder.as_streaming_dataset(split) if streaming else builder.as_dataset(split)
        pixels = isinstance((rows.features or {}).get(field), Array2D | Array3D)
        if isinstance((rows.features or {}).get(field), Image):
            rows = rows.cast_column(field, Image(decode=False))  # pixels.py reads it, as every picture
        rows = rows.with_format("arrow") if pixels else rows  # as lists of numbers, 64 x 64 take 4 ms
        names = rows.column_names or list(next(iter(rows), {field: None}))  # JSON lines are typed as they are read
        if field in names:
            rows = rows.select_columns([field])
            if streaming and state is not None:
                rows.load_state_dict(state)
            elif first:
                rows = rows.skip(first)
            read = rows.iter(config.shuffle or ROWS)
            while (batch := next(read, None)) is not None:
                values = [x for chunk in batch[field].chunks for x in chunk.to_numpy()] if pixels else batch[field]
                yield first, state, values
                first += len(values)
                state = rows.state_dict() if streaming else None
            return
    except (OSError, ValueError, TypeError, RuntimeError, DatasetsError) as error:
        cause = error.__cause__ or error  # "An error occurred while generating the dataset" helps nobody
        raise ConfigError(f"data.source: {split} of the dataset is not readable: {one_line(cause)}") from None
    raise ConfigError(f"data.field = {field}: no such column; {split} has {', '.join(names)}")


def text_of(value: Any, split: str, number: int, config: DataConfig) -> bytes:
    """The bytes of a row's text, or of its picture."""
    if value is None:
        return b""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"data.source: row {number} of {split} holds half of a surrogate pair") from None
    picture = picture_of(value, f"row {number} of {split}")
    if picture is not None:
        return pixel_bytes(picture, config.image_size)
    raise ConfigError(f"data.field = {config.field}: row {number} of {split} holds {type(value).__name__}, not text")
