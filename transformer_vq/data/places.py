"""Streams of pieces that can be gone on from, and parts of streams.

A stream of rows notes its `place` before each batch of rows: what its reader needs to begin there again, and the bytes
before it. Whoever notes that place, and how many pieces came since, can go on after a kill without the rows before the
batch; a part that follows another begins near where that one ended. Streams without places are read from their start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

from transformer_vq.data.documents import Border, Piece, Pieces, take


class Place(NamedTuple):
    """Where a batch of rows begins."""

    at: Any
    """For the reader of the stream, as JSON has it."""
    bytes: int
    """Of that stream before it."""


@runtime_checkable
class Stream(Protocol):
    """Pieces that can be read from a place on, which is where a document begins."""

    place: Place | None
    """Of the batch that was read last. To set it spares reading what is known to lie before."""

    def __call__(self, place: Place | None = None) -> Iterator[Piece]:
        """All of it, or what follows the place."""

    def before(self, place: Place) -> int | None:
        """Bytes of this stream before the place; None: it is a place of another stream."""


class Total:
    """How many bytes a stream has: measured once, when it is asked, unless `known` is set before."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces
        self.known: int | None = None

    def __call__(self) -> int:
        """Reads the stream if need be."""
        if self.known is None:
            self.known = sum(len(piece.text) for piece in self.pieces())
        return self.known


class Part:
    """Bytes [start, stop) of a stream, as `take` cuts them; one that can be gone on from where the whole can."""

    def __init__(
        self, whole: Pieces, bounds: Callable[[], tuple[int, int | None]], border: Border, total: Total | None = None
    ) -> None:
        """total: what the bounds follow from."""
        self.whole, self.bounds, self.border, self.total = whole, bounds, border, total

    @property
    def place(self) -> Place | None:
        """See `Stream`."""
        return self.whole.place if isinstance(self.whole, Stream) else None

    @place.setter
    def place(self, place: Place | None) -> None:
        if isinstance(self.whole, Stream):
            self.whole.place = place

    def before(self, place: Place) -> int | None:
        """See `Stream`."""
        passed = self.whole.before(place) if isinstance(self.whole, Stream) else None
        return None if passed is None else max(0, passed - self.bounds()[0])

    def __call__(self, place: Place | None = None) -> Iterator[Piece]:
        """See `Stream`. Without a place it begins at the one that was read last, where that lies before the part."""
        start, stop = self.bounds()
        if not isinstance(self.whole, Stream):
            return take(self.whole(), start, stop, self.border)
        passed = None if (last := place or self.whole.place) is None else self.whole.before(last)
        if passed is None or (place is None and passed > start):
            return take(self.whole(), start, stop, self.border)
        return take(self.whole(last), start - passed, None if stop is None else stop - passed, self.border)


def carve(pieces: Pieces, names: tuple[str, ...], border: Border) -> dict[str, Pieces]:
    """Cut one stream by position: 5 % at the end for each of `names` but the first, which keeps the rest.

    The stream is measured when the first of them is read, not before.
    """
    total = Total(pieces)

    def bounds(i: int) -> tuple[int, int]:
        share = [0, *(100 - 5 * (len(names) - 1 - j) for j in range(len(names)))]
        return total() * share[i] // 100, total() * share[i + 1] // 100

    return {name: Part(pieces, partial(bounds, i), border, total) for i, name in enumerate(names)}


def total_of(pieces: Pieces) -> Total:
    """What the bounds of a part follow from; of anything else, one that nobody asks."""
    return pieces.total if isinstance(pieces, Part) and pieces.total is not None else Total(pieces)


def is_stream(pieces: Pieces) -> bool:
    """Whether it can be gone on from."""
    return is_stream(pieces.whole) if isinstance(pieces, Part) else isinstance(pieces, Stream)


class Reading:
    """The pieces of a split as they are handed on, and where the last of them lies."""

    def __init__(self, stream: Pieces, pieces: Iterator[Piece], skip: int = 0) -> None:
        """pieces: made of those of `stream` one by one, the first `skip` of which are known already."""
        self.stream, self.pieces, self.skip = stream, pieces, skip
        self.place: Place | None = None
        self.since = 0
        """Pieces from the place on, up to the last one handed on."""

    def __iter__(self) -> Iterator[Piece]:
        for piece in self.pieces:
            place = self.stream.place if isinstance(self.stream, Stream) else None
            if place is not self.place:
                self.place, self.since = place, 0
            self.since += 1
            if self.skip:
                self.skip -= 1
            else:
                yield piece
