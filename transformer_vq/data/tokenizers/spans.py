"""Which bytes of a text each of its tokens stands for, from the characters that a library says it was made of.

Every byte of a piece belongs to one token:
    a token has the bytes from the end of the one before it to its own end: what is dropped between two tokens, like
    white space, belongs to the one that follows it, and what is dropped at the end of the piece to the last one
    tokens made of the same characters, like the three bytes of one, share their bytes evenly, odd ones to the later
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def covered_bytes(text: bytes, offsets: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """text in UTF-8, offsets: first character of each token and the one after its last -> (n,), whose sum is the text.

    Offsets may overlap, lie in any order or be empty; n = 0 gives no numbers.
    """
    if not offsets:
        return np.empty(0, np.int64)
    raw = np.frombuffer(text, np.uint8)
    starts = np.append(np.flatnonzero((raw & 0xC0) != 0x80), len(raw))  # of characters; a byte 10xxxxxx continues one
    return share_out(starts[np.asarray(offsets, np.int64).clip(0, len(starts) - 1)], len(raw))


def share_out(spans: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """spans (n, 2) first byte of each token and the one after its last -> (n,), whose sum is `size`; n >= 1."""
    new = np.any(spans[1:] != spans[:-1], axis=1)
    group = np.concatenate([[0], np.cumsum(new)])  # of tokens on the same characters
    first = np.concatenate([[0], np.flatnonzero(new) + 1])
    shares = np.diff(first, append=len(spans))[group]
    place = np.arange(len(spans)) - first[group] + 1
    begin, end = spans[:, 0], spans[:, 1]
    ends = np.maximum.accumulate(begin + np.maximum(end - begin, 0) * place // shares)
    ends[-1] = size
    return np.diff(ends, prepend=0)


def slices(text: bytes, covers: NDArray[np.int64]) -> list[bytes]:
    """The bytes of each token."""
    ends = np.cumsum(covers).tolist()
    return [text[a:b] for a, b in zip([0, *ends][:-1], ends, strict=True)]
