"""Batches as pure functions of (seed, step): resuming needs no replay, and it does not matter who makes which row.

Two orders for training: windows (random, independent) and streams (contiguous, for truncated BPTT). Two passes for
evaluation: streams that carry the state, and overlapping windows that cut the context. A label is the next token of the
split, also where that begins a document: every token counts in bits per byte.

Axes:   B batch  T length   n tokens of the split
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transformer_vq.data.store import TokenFile

CHOICE = 1 << 64
"""Added to a seed: the draws that choose a source are others than those of places."""

IGNORED = -100
"""Label of a position whose next token does not count."""


class Batch(NamedTuple):
    """Rows of text."""

    tokens: Tensor
    """(B, T) int64."""
    labels: Tensor
    """(B, T) int64: the token that follows, or -100."""
    segments: Tensor | None
    """(B, T) int64, the document's number in the split; None when document boundaries are ignored."""
    fresh: Tensor
    """(B,) bool: the row continues nothing, its state starts empty."""


def window_batch(
    file: TokenFile, seed: int, step: int, rows: range, batch_size: int, seq_len: int, reset: bool = False
) -> Batch:
    """Rows `rows` of the batch_size windows of a step: starts are uniform over the split, drawn one by one.

    Window number step·batch_size + row depends on seed and its number alone. reset: give segments.
    Raises ValueError when the split is shorter than a window and its last label (see check_lengths).
    """
    places = len(file) - seq_len
    if places < 1:
        raise ValueError(f"{file.name} has {len(file)} tokens: no window of {seq_len} and a label")
    starts = [draw(seed, step * batch_size + row, places) for row in rows]
    return gather(file, np.array(starts, np.int64), seq_len, reset, np.ones(len(rows), bool))


def mixed_batch(
    files: Mapping[str, TokenFile],
    shares: Mapping[str, float],
    seed: int,
    step: int,
    rows: range,
    batch_size: int,
    seq_len: int,
    reset: bool = False,
) -> Batch:
    """Rows `rows` of the windows of a step, each of one of `files` with its probability, then as `window_batch` has it.

    The file of window number step·batch_size + row depends on seed and its number alone. Segments are numbers of
    documents in the row's own file.
    """
    if len(files) == 1:
        (file,) = files.values()
        return window_batch(file, seed, step, rows, batch_size, seq_len, reset)
    order, borders = list(files.values()), np.cumsum([shares[name] for name in files])[:-1]
    parts = []
    for row in rows:
        point = draw(seed + CHOICE, step * batch_size + row, 1 << 53) / (1 << 53)
        file = order[int(np.searchsorted(borders, point, side="right"))]
        parts.append(window_batch(file, seed, step, range(row, row + 1), batch_size, seq_len, reset))
    segments = [part.segments for part in parts if part.segments is not None]
    return Batch(
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat(segments) if segments else None,
        torch.cat([part.fresh for part in parts]),
    )


def stream_batch(
    file: TokenFile,
    seed: int,
    step: int,
    rows: range,
    batch_size: int,
    seq_len: int,
    updates_per_sequence: int | None = None,
    reset: bool = False,
    whole: bool = False,
) -> Batch:
    """Rows `rows` of a step of batch_size streams, which cut the split into equal parts and are read side by side.

    All streams of an epoch are C = (n−1) // (B·T) steps long; what is left over, under B·T tokens, lies before the
    first and behind the last, shared out anew each epoch. The seed decides at which step of the epoch reading begins.
    fresh: at the first step, at the start of an epoch, and after each `updates_per_sequence` steps.
    whole: reading begins, and is fresh, at multiples of updates_per_sequence · T tokens alone: pictures of that length,
    which are documents one after another, are each a sequence; C is rounded down to whole ones.
    Raises ValueError when the split is too short for one step.
    """
    updates = updates_per_sequence if whole and updates_per_sequence is not None else 1
    steps = (len(file) - 1) // (batch_size * updates * seq_len) * updates
    if steps < 1:
        raise ValueError(
            f"{file.name} has {len(file)} tokens: too few for {batch_size} streams of {updates * seq_len} and a label"
        )
    epoch, at = divmod(step + draw(seed, 0, steps // updates) * updates, steps)
    spare = len(file) - 1 - steps * batch_size * seq_len
    grid = updates * seq_len if whole else 1
    first = draw(seed, 1 + epoch, spare // grid + 1) * grid
    starts = first + (np.arange(rows.start, rows.stop, rows.step) * steps + at) * seq_len
    fresh = step == 0 or at == 0 or (updates_per_sequence is not None and step % updates_per_sequence == 0)
    return gather(file, starts.astype(np.int64), seq_len, reset, np.full(len(rows), fresh))


class Pass(Sequence[Batch]):
    """Batches of an evaluation in their order, each read when it is asked for."""

    def __init__(self, count: int, read: Callable[[int], Batch]) -> None:
        self.length, self.read = count, read

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]  # one at a time
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.read(index)


def eval_streams(
    file: TokenFile, length: int, streams: int = 1, reset: bool = False, start: int = 0, stop: int | None = None
) -> Pass:
    """The whole split, or its tokens start … stop, once, `length` tokens a step, in `streams` equal parts side by side;
    the state is carried.

    Every token but the very first is a label exactly once. With one stream its context is everything before; with more,
    each but the first starts without the text before it. Parts differ by at most one token: the last column may hold
    padding, label -100, after which nothing of that row follows.
    """
    last = len(file) - 1 if stop is None else stop
    borders = np.linspace(start, last, streams + 1).astype(np.int64)
    longest = int(np.diff(borders).max())

    def read(index: int) -> Batch:
        at = index * length
        places = borders[:-1, None] + at + np.arange(min(length, longest - at))
        return gather_places(file, places, places < borders[1:, None], reset, np.full(streams, at == 0))

    return Pass(-(-longest // length), read)


def eval_windows(file: TokenFile, width: int, batch_size: int, reset: bool = False) -> Pass:
    """The whole split once, in windows of `width` tokens that overlap by half; each starts without a state.

    Only labels that no earlier window has count: all of the first window, then the second half, so that every token but
    the very first is predicted exactly once, from at least width − width // 2 + 1 tokens where so many precede it.
    Where documents of `width` tokens, pictures, are read apart, they are the windows: all of one precedes its tokens.
    """
    last = len(file) - 1
    width, stride = min(width, last), max(width // 2, 1)
    if reset and file.documents_have(width):
        starts = done = file.documents
    else:
        starts = np.append(np.arange(0, last - width, stride), last - width)  # the last one ends with the split
        done = np.append(0, starts[:-1] + width)  # positions below this were scored

    def read(index: int) -> Batch:
        at = index * batch_size
        places = starts[at : at + batch_size, None] + np.arange(width)
        counts = (places >= done[at : at + batch_size, None]) & (places < last)
        return gather_places(file, np.minimum(places, last), counts, reset, np.ones(len(places), bool))

    return Pass(-(-len(starts) // batch_size), read)


def document_spans(file: TokenFile, least: int) -> list[tuple[int, int]]:
    """[start, stop) of runs of whole documents, each of `least` tokens or more but the last; they cover the split up to
    its last token, which is only a label.
    """
    last, cuts = len(file) - 1, [0]
    for start in file.documents.tolist():
        if start - cuts[-1] >= least and start < last:
            cuts.append(start)
    return list(zip(cuts, [*cuts[1:], last], strict=True))


def draw(seed: int, index: int, below: int) -> int:
    """The index-th random number of `seed`, uniform in [0, below): a counter, no state  [Philox, Salmon 2011]."""
    key = np.array([seed & (2**64 - 1), seed >> 64 & (2**64 - 1)], np.uint64)
    raw = np.random.Philox(key=key, counter=index << 64).random_raw()  # the low word counts within a draw
    return int(raw) * below >> 64


def gather(file: TokenFile, starts: NDArray[np.int64], length: int, reset: bool, fresh: NDArray[np.bool_]) -> Batch:
    """Rows of `length` tokens from `starts` on, every label counting."""
    places = starts[:, None] + np.arange(length)
    return gather_places(file, places, np.ones(places.shape, bool), reset, fresh)


def gather_places(
    file: TokenFile, places: NDArray[np.int64], counts: NDArray[np.bool_], reset: bool, fresh: NDArray[np.bool_]
) -> Batch:
    """Tokens at `places` (B, T), their next tokens as labels where `counts`."""
    tokens = file.tokens[places].astype(np.int64)
    following = file.tokens[np.minimum(places + 1, len(file) - 1)].astype(np.int64)
    segments = np.searchsorted(file.documents, places, side="right") - 1 if reset else None
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(np.where(counts, following, IGNORED)),
        None if segments is None else torch.from_numpy(segments.astype(np.int64)),
        torch.from_numpy(fresh),
    )
