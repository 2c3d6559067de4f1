"""From ids back to bytes, for tokenizers that another library runs.

Three ways:
    a table        byte-level vocabularies, and those of plain strings from which nothing was dropped: a token has the
                   same bytes wherever it stands. Added tokens are their own text, never symbols of bytes
    byte by byte   `<0xE4>` of a vocabulary with a byte fallback; half a character stays half a character
    the library    everything else; a token's text may depend on the one before it
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from transformer_vq.data.tokenizers.base import Tokenizer
from transformer_vq.data.tokenizers.spans import slices

KEPT_TEXTS = 1 << 20  # texts of pairs of tokens that are remembered


class LibraryTokenizer(Tokenizer):
    """A tokenizer whose library decodes ids to text."""

    reads_text = True
    _table: dict[int, bytes] | None
    """The bytes of each token, where they are the same everywhere."""
    _bytes: dict[int, int]
    """Tokens that are one byte of a character, where there is no table."""

    def __init__(self) -> None:
        self._texts: dict[tuple[int, int], bytes] = {}

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """What the library makes of ids."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        listed = [int(i) for i in ids if 0 <= int(i) < self.vocab_size]
        if self._table is not None:
            return b"".join(self._table.get(i, b"") for i in listed)
        found, before = b"", None
        for single, run in groupby(listed, self._bytes.__contains__):
            row = list(run)
            found += bytes(self._bytes[i] for i in row) if single else self._after(before, row)
            before = row[-1]
        return found

    def _lost(self, text: bytes, ids: list[int], covers: NDArray[np.int64]) -> int:
        """Bytes of a piece under tokens whose text is another; all, where it changes but no token shows it."""
        if self.decode_bytes(ids) == text:
            return 0
        befores = [None, *ids][:-1]
        lost = sum(
            len(mine)
            for before, i, mine in zip(befores, ids, slices(text, covers), strict=True)
            if self._text(before, i) != mine
        )
        return lost or len(text)

    def _text(self, before: int | None, i: int) -> bytes:
        """What a token stands for behind another."""
        if self._table is not None:
            return self._table.get(i, b"")
        if i in self._bytes:
            return bytes([self._bytes[i]])
        key = (-1 if before is None else before, i)
        if key not in self._texts:
            if len(self._texts) >= KEPT_TEXTS:
                self._texts.clear()
            self._texts[key] = self._after(before, [i])
        return self._texts[key]

    def _after(self, before: int | None, ids: list[int]) -> bytes:
        """Text of `ids` where `before` precedes them: some decoders drop a space, but at the beginning alone."""
        if before is not None:
            start, whole = self._decode([before]), self._decode([before, *ids])
            if whole.startswith(start):
                return whole[len(start) :].encode()
        return self._decode(ids).encode()
