"""The files of one split while it is tokenized, and how far they are; names as store.py and tokenizing.py have them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from transformer_vq.data.documents import Piece
from transformer_vq.data.tokenizers import Encoded, Tokenizer, token_dtype
from transformer_vq.data.words import WordCounter

COUNTS = ("covers", "words_begun")
"""Files of one number a token."""
SOME = 1 << 22
"""Numbers of a long array that are looked at at once."""


@dataclass
class Done:
    """Of one split: what is tokenized, in whole groups."""

    groups: int = 0
    bytes: int = 0
    tokens: int = 0
    documents: int = 0
    """Entries of `.starts`."""
    counted: int = 0
    """Entries of the files of COUNTS."""
    words: int = 0
    after_space: bool = True
    unknown: int = 0
    lost: int = 0
    waiting: list[int] = field(default_factory=lambda: [0, 0])
    """Bytes, and words that begin, of pieces without a token, for the next one."""
    bytewise: bool = False
    """A token is a byte."""
    dtypes: dict[str, str | None] | None = None
    """Types of the files of COUNTS, None: there is none; set when the split is done."""
    place: list[Any] | None = None
    """Of a dataset: what `Place` holds, and how many pieces are tokenized from there on."""


class Writer:
    """Writes the files of one split, from where `done` says they stand, and keeps `done` up to date.

    Beside the tokens, the bytes and the beginnings of words under each of them, unless a token is a byte. Bytes of
    pieces without a token belong to the next token, those at the end of the split to its last one.
    """

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer, done: Done) -> None:
        self.folder, self.name, self.tokenizer, self.done = folder, name, tokenizer, done
        self.words = WordCounter(done.words, done.after_space)
        self.starts = folder / f"{name}.starts"
        self.wide = [folder / f"{name}.{kind}.wide" for kind in COUNTS]

    def __enter__(self) -> Writer:
        self._files = ExitStack()
        if self.done.dtypes is None:
            width = np.dtype(token_dtype(self.tokenizer.vocab_size)).itemsize
            self._tokens = self._open(self.folder / f"{self.name}.tokens", self.done.tokens * width)
            self._starts = self._open(self.starts, self.done.documents * 8)
            self._counts = [self._open(path, self.done.counted * 4) for path in self.wide]
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def _open(self, path: Path, size: int) -> IO[bytes]:
        """To go on behind `size` bytes: what a killed process wrote beyond is not in the journal."""
        file = self._files.enter_context(path.open("r+b" if path.exists() else "w+b"))
        file.truncate(size)
        file.seek(size)
        return file

    def add(self, group: Sequence[Piece]) -> None:
        """Tokenize and write."""
        done, unknown = self.done, self.tokenizer.unknown_id
        begun = [self.words.read(piece) for piece in group]
        encoded = self.tokenizer.encode_pieces(group)
        begins = np.array([piece.begins for piece in group])
        starts = done.tokens + (np.cumsum(encoded.lengths) - encoded.lengths)[begins]
        starts.astype(np.int64).tofile(self._starts)
        encoded.ids.tofile(self._tokens)
        self._count(group, encoded, begun)
        done.groups += 1
        done.bytes += sum(len(piece.text) for piece in group)
        done.documents += len(starts)
        done.tokens += len(encoded.ids)
        done.words, done.after_space = self.words.words, self.words.after_space
        done.unknown += int((encoded.ids == unknown).sum()) if unknown is not None else 0
        done.lost += encoded.lost

    def _count(self, group: Sequence[Piece], encoded: Encoded, begun: Sequence[NDArray[np.int64]]) -> None:
        """begun: places in each piece at which words begin."""
        if encoded.covers is None:
            self.done.bytewise = True
            return
        at, waiting = 0, np.array(self.done.waiting, np.int64)
        for piece, length, words in zip(group, encoded.lengths.tolist(), begun, strict=True):
            covers = encoded.covers[at : at + length]
            at += length
            if not length:
                waiting += len(piece.text), len(words)
                continue
            ends = np.cumsum(covers)
            under = np.bincount(np.searchsorted(ends, words, side="right"), minlength=length)
            for file, numbers, more in zip(self._counts, (covers, under), waiting, strict=True):
                wide = numbers.astype(np.uint32)
                wide[0] += more
                wide.tofile(file)
            self.done.counted += length
            waiting[:] = 0
        self.done.waiting = waiting.tolist()

    def sync(self) -> None:
        """Have the disk take what was written."""
        for file in (self._tokens, self._starts, *self._counts):
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Documents once each, and counts in as small a type as holds them."""
        done = self.done
        self._documents()
        dtypes: dict[str, str | None] = dict.fromkeys(COUNTS)
        for kind, wide, more in zip(COUNTS, self.wide, done.waiting, strict=True):
            if done.bytewise or not done.counted:
                continue
            numbers = np.memmap(wide, np.uint32, "r")
            largest = max(int(part.max()) for part in parts(numbers))
            dtype = np.min_scalar_type(max(largest, int(numbers[-1]) + more))
            with (self.folder / f"{self.name}.{kind}").open("wb") as narrow:
                for part in parts(numbers):
                    part.astype(dtype).tofile(narrow)
                if more:
                    narrow.seek(-dtype.itemsize, os.SEEK_END)
                    np.array([int(numbers[-1]) + more], dtype).tofile(narrow)
            dtypes[kind] = dtype.name
            del numbers
        done.dtypes = dtypes

    def _documents(self) -> None:
        """A document without tokens begins where the next one does, or at the end, where none begins."""
        starts = np.memmap(self.starts, np.int64, "r")
        kept, last = 0, -1
        with (self.folder / f"{self.name}.documents.raw").open("wb") as file:
            for part in parts(starts):
                begins = part[(np.diff(part, prepend=last) > 0) & (part < self.done.tokens)]
                begins.tofile(file)
                kept, last = kept + len(begins), int(part[-1])
        del starts
        raw = Path(file.name)
        with (self.folder / f"{self.name}.documents.npy").open("wb") as out:
            header = {"descr": "<i8", "fortran_order": False, "shape": (kept,)}
            np.lib.format.write_array_header_1_0(out, header)
            with raw.open("rb") as begun:
                shutil.copyfileobj(begun, out)
        raw.unlink()

    def forget(self) -> None:
        """Remove what is needed while a split is written."""
        for path in (self.starts, *self.wide):
            path.unlink(missing_ok=True)


def parts(numbers: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """A long array, some at a time."""
    return (numbers[at : at + SOME] for at in range(0, len(numbers), SOME))
