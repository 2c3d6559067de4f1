"""Tokenizing a corpus, group by group: memory does not grow with the text, and after a kill the next process goes on.

    tokenizer.json, {train,valid,test}.tokens, .documents.npy, .covers, .words_begun    as store.py has them
    SPLIT.starts (int64), SPLIT.KIND.wide (uint32)    while a split is written: where documents begin, and counts
    journal.json                                      how far it is: what was written until then is on the disk

Going on reads the text again, for its hash, and does not tokenize what is tokenized.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from transformer_vq.config import ConfigError, DataConfig
from transformer_vq.data.documents import (
    SPLITS,
    Border,
    Piece,
    border_of,
    reads_pictures,
    separator_of,
    split_at_separator,
    take,
)
from transformer_vq.data.sources import Source
from transformer_vq.data.tokenizers import (
    Encoded,
    IdTokenizer,
    Tokenizer,
    load_tokenizer,
    make_tokenizer,
    reads_bytes,
    token_dtype,
    tokenizer_identity,
)
from transformer_vq.data.words import WordCounter

GROUP = 1 << 22
"""Bytes that are tokenized at once."""
COUNTS = ("covers", "words_begun")
"""Files of one number a token."""
OFTEN = 10.0  # seconds between two entries in the journal
JOURNAL = "journal.json"

Progress = Callable[[str, int], None]
"""Called with a split's name and the bytes read of it so far."""


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


def tokenize(folder: Path, source: Source, config: DataConfig, progress: Progress | None) -> dict[str, Any]:
    """Write tokenizer and token files of all splits; what has to be known about them is returned.

    folder: empty, or where a process that read the same was killed; a journal is left behind.
    """
    border = border_of(config, reads_text=not reads_bytes(tokenizer_identity(config.tokenizer)))
    journal, done = folder / JOURNAL, dict[str, Done]()
    if journal.is_file():
        kept: dict[str, Any] = json.loads(journal.read_text(encoding="utf-8"))
        done, tokenizer = {name: Done(**values) for name, values in kept.items()}, load_tokenizer(folder)
    else:
        tokenizer = make_tokenizer(config.tokenizer, read_split(source, "train", config, border))
        if isinstance(tokenizer, IdTokenizer):
            raise ConfigError(
                f"data.tokenizer = {config.tokenizer}: is for tokens without text (a folder of train.bin); "
                f"data.source = {config.source} holds text"
            )
        tokenizer.save(folder)
    text_hash = hashlib.sha256()
    for name in SPLITS:
        mine = done.setdefault(name, Done())
        with Writer(folder, name, tokenizer, mine) as out:
            size, noted = 0, time.monotonic()
            for i, group in enumerate(groups(read_split(source, name, config, border))):
                for piece in group:
                    text_hash.update(piece.text)
                    size += len(piece.text)
                if i >= mine.groups:
                    out.add(group)
                    if time.monotonic() - noted >= OFTEN:
                        out.sync()
                        note(journal, done)
                        noted = time.monotonic()
                if progress is not None:
                    progress(name, size)
            if mine.tokens == 0:
                raise ConfigError(
                    f"data.source = {config.source}: no text for {name}; the corpus is too small to be split"
                )
            if mine.dtypes is None:
                out.sync()
                note(journal, done)
                out.finish()
                note(journal, done)
        out.forget()
    pictures = reads_pictures(config)
    splits = {
        name: {"bytes": one.bytes, "words": 0 if pictures else one.words, **(one.dtypes or {})}
        for name, one in done.items()
    }
    return {"splits": splits, "notes": notes(done, config, tokenizer, source), "sha256": text_hash.hexdigest()}


def note(journal: Path, done: dict[str, Done]) -> None:
    """Write the journal, in one piece. What it speaks of is on the disk."""
    beside = journal.with_suffix(".new")
    with beside.open("w", encoding="utf-8") as file:
        json.dump({name: asdict(one) for name, one in done.items()}, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(journal)


def notes(done: dict[str, Done], config: DataConfig, tokenizer: Tokenizer, source: Source) -> list[str]:
    """What is to be said about the tokens."""
    unknown, lost, total = (sum(getattr(one, what) for one in done.values()) for what in ("unknown", "lost", "bytes"))
    found = []
    if unknown:
        found.append(f"{unknown:,} tokens are the tokenizer's unknown token: it lacks some of the characters")
    if lost:
        found.append(
            f"{share(lost, total)} of the text does not come back from its tokens: {lost:,} of {total:,} bytes lie "
            "under tokens that stand for another text; bits per byte count the bytes that were read"
        )
    if config.tokenizer.startswith("bpe:") and tokenizer.vocab_size < int(config.tokenizer.removeprefix("bpe:")):
        found.append(f"the text has pairs to merge for {tokenizer.vocab_size} tokens only")
    return [*found, *source.measured()]


def share(part: int, whole: int) -> str:
    """A share in per cent that is 0 or 100 % only where it is exactly that."""
    per_cent = 100 * part / whole
    rounded = f"{per_cent:.2f} %" if per_cent < 10 else f"{per_cent:.1f} %"
    if part and float(rounded[:-2]) == 0:
        return "less than 0.01 %"
    return "more than 99.9 %" if part < whole and float(rounded[:-2]) == 100 else rounded


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
    return (numbers[at : at + GROUP] for at in range(0, len(numbers), GROUP))


def read_split(source: Source, name: str, config: DataConfig, border: Border) -> Iterator[Piece]:
    """The pieces of a split, at most `max_bytes` (`max_eval_bytes`) of them, documents split at the separator."""
    pieces = source.splits[name]()
    limits = [config.max_bytes, None if name == "train" else config.max_eval_bytes]
    for limit in filter(None, limits):
        pieces = take(pieces, 0, limit, border)
    if (separator := separator_of(config)) is not None:
        pieces = split_at_separator(pieces, separator)
    return pieces


def groups(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in groups of about GROUP bytes."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.text)
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group
