"""Token files: a corpus tokenized once, memory-mapped afterwards.

    CACHE/KEY/meta.json, tokenizer.json, {train,valid,test}.tokens (raw, smallest unsigned type), .documents.npy (int64)
    and, where a token is not a byte, .covers and .words_begun: bytes of the text and words that begin under each token
    KEY = hash of (format, the source's content and splits, tokenizer, the settings of `data` that change tokens)

An entry is written into a temporary folder beside it, flushed to the disk and renamed, under a lock: a folder with a
KEY is whole, whatever was killed and however many processes race.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from transformer_vq.config import ConfigError, DataConfig
from transformer_vq.data.cache import cache_of
from transformer_vq.data.corpora import open_source
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
from transformer_vq.data.token_files import TokenSource, holds_tokens, open_tokens, store_tokens
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
from transformer_vq.files import room

FORMAT = 3
GROUP = 1 << 22
"""Bytes that are tokenized at once."""
COUNTS = ("covers", "words_begun")
"""Files of one number a token."""

Progress = Callable[[str, int], None]
"""Called with a split's name and the bytes read of it so far."""


@dataclass(frozen=True)
class TokenFile:
    """One split as tokens."""

    name: str
    tokens: NDArray[np.unsignedinteger]
    """(n,) uint8, uint16 or uint32, memory-mapped, read-only."""
    documents: NDArray[np.int64]
    """Positions at which a document begins, increasing, the first 0."""
    bytes: int | None
    """Of the text behind all tokens, for bits per byte; None where tokens came without their text."""
    words: int
    """Of that text, separated by white space, for the perplexity per word; 0 of pictures and where it is not known."""
    tokenizer: Tokenizer
    covers: NDArray[np.unsignedinteger] | None = None
    """(n,) bytes of the text that each token stands for, whose sum is `bytes`; None: one each, or not known."""
    begins: NDArray[np.unsignedinteger] | None = None
    """(n,) words of the text that begin under each token; None: as its bytes have them."""

    def __len__(self) -> int:
        return len(self.tokens)

    def documents_have(self, length: int) -> bool:
        """Every document has `length` tokens, as pictures of one size have; the last one may be cut short."""
        lengths = np.diff(self.documents, append=len(self))
        return bool(np.all(lengths[:-1] == length) and lengths[-1] <= length)

    def head(self, count: int) -> TokenFile:
        """The first `count` tokens, with the bytes and the beginnings of words under them."""
        if count >= len(self):
            return self
        documents = self.documents[: np.searchsorted(self.documents, count)]
        return replace(
            self,
            tokens=self.tokens[:count],
            documents=documents,
            bytes=None if self.bytes is None else int(self.covered(0, count).sum()),
            words=self._words(count) if self.words else 0,
            covers=None if self.covers is None else self.covers[:count],
            begins=None if self.begins is None else self.begins[:count],
        )

    def covered(self, start: int, stop: int) -> NDArray[np.int64]:
        """Bytes of the text under each of the tokens [start, stop).  Raises ValueError where they are not known."""
        if self.bytes is None:
            raise ValueError(f"{self.name}: the tokens came without their text, so bytes under them are not known")
        if self.covers is None:
            return np.ones(min(stop, len(self)) - start, np.int64)
        return self.covers[start:stop].astype(np.int64)

    def _words(self, count: int) -> int:
        """Words that begin under the first tokens."""
        if self.begins is not None:
            return int(self.begins[:count].sum(dtype=np.int64))
        counter = WordCounter()  # a token is a byte, so this is the text itself
        counter.read(Piece(self.tokenizer.decode_bytes(self.tokens[:count].tolist()), True, self.name, 0))
        return counter.words


@dataclass(frozen=True)
class Corpus:
    """Train, valid and test as tokens, and what is to be said about them."""

    name: str
    splits: dict[str, TokenFile]
    tokenizer: Tokenizer
    sha256: str
    """Of the text of train, valid and test in a row: of a file split by position, the hash of that file."""
    folder: Path
    """The entry in the cache."""
    notes: tuple[str, ...]

    def describe(self) -> str:
        """One paragraph: which text, how much, how split, which hash."""
        sizes = "; ".join(
            f"{name} {'unknown' if file.bytes is None else f'{file.bytes:,}'} bytes, {len(file):,} tokens, "
            f"{len(file.documents):,} documents"
            for name, file in self.splits.items()
        )
        notes = "".join(f" {note[0].upper()}{note[1:]}." for note in self.notes)
        return f"{self.name}: {sizes}. Tokenizer: {self.tokenizer.name}. sha256 of the text: {self.sha256}.{notes}"


def prepare(config: DataConfig, progress: Progress | None = None) -> Corpus:
    """Tokenize a corpus, or find it tokenized.  Raises ConfigError, one line, and leaves nothing half-written."""
    if config.mix is not None:
        raise ConfigError("data.mix: here one source is read; name it as data.source, and data.mix=null")
    identity = tokenizer_identity(config.tokenizer)
    source: Source | TokenSource
    if holds_tokens(config.source):
        source = open_tokens(config)
    else:
        source = open_source(config, border_of(config, reads_text=not reads_bytes(identity)))
    limits = [config.max_bytes, config.max_eval_bytes]
    separator = None if (found := separator_of(config)) is None else found.decode("utf-8", "backslashreplace")
    made_from = [FORMAT, source.fingerprint, identity, separator, *limits]
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]
    cache = cache_of(config)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{key}.lock"):
            if not is_whole(cache / key):
                write_entry(cache / key, source, config, progress)
    except OSError as error:
        raise ConfigError(f"data.cache = {cache}: tokens cannot be kept there: {error}{room(error, cache)}") from None
    corpus = open_entry(cache / key, source)
    return replace(corpus, notes=(*corpus.notes, *without_effect(config, corpus)))


def without_effect(config: DataConfig, corpus: Corpus) -> list[str]:
    """Notes about settings that change nothing in this corpus."""
    notes, splits = [], corpus.splits.values()
    separator = separator_of(config)
    if separator is not None and not any(holds(file, separator) for file in splits):
        notes.append(
            f"data.document_separator = {separator!r} stands nowhere in the text, and separates nothing (\\n is a line "
            "break, \\\\ a backslash)"
        )
    if config.document_boundaries == "reset" and all(len(file.documents) == 1 for file in splits):
        notes.append("data.document_boundaries = reset changes nothing: every split is a single document")
    rows = config.source.startswith("hf:")
    default = DataConfig()
    if not rows and config.field != default.field:
        notes.append(f"data.field = {config.field} names nothing: only the rows of hf: have columns")
    if not rows and config.streaming:
        notes.append("data.streaming changes nothing: only hf: is downloaded")
    for key in ("max_bytes", "max_eval_bytes"):
        limit = getattr(config, key)
        limited = corpus.splits if key == "max_bytes" else [name for name in corpus.splits if name != "train"]
        sizes = [corpus.splits[name].bytes for name in limited]
        if (
            limit is not None
            and not holds_tokens(config.source)
            and all(size is not None and size < limit for size in sizes)
        ):
            notes.append(f"data.{key} = {limit:,} cuts nothing off: {' and '.join(limited)} are shorter")
    return notes


def holds(file: TokenFile, separator: bytes) -> bool:
    """A document of the split, but its last one, ends with the separator; the first few are looked at."""
    ends = file.documents[1:65]
    longest = len(separator)  # tokens behind so many bytes, at most
    return any(
        file.tokenizer.decode_bytes(file.tokens[max(end - longest, 0) : end].tolist()).endswith(separator)
        for end in ends.tolist()
    )


def check_lengths(corpus: Corpus, seq_len: int, streams: int = 1, updates: int = 1) -> None:
    """Raise ConfigError when train is shorter than one step of `streams` rows, or a split has nothing to predict.

    updates: so many steps are needed, where sequences are whole.
    """
    for name, file in corpus.splits.items():
        need = streams * updates * seq_len + 1 if name == "train" else 2
        if len(file) < need:
            rows = f"{streams} streams of train.seq_len = {seq_len}" if streams > 1 else f"train.seq_len = {seq_len}"
            rows += f", {updates} updates a sequence" if updates > 1 else ""
            why = rows if name == "train" else "an evaluation"
            raise ConfigError(f"data.source: {name} of {corpus.name} has {len(file)} tokens; at least {need} for {why}")


def is_whole(entry: Path) -> bool:
    """There, and every file of the size it was written with."""
    if not (entry / "meta.json").is_file():
        return False
    files: dict[str, int] = json.loads((entry / "meta.json").read_text(encoding="utf-8"))["files"]
    return all((entry / name).is_file() and (entry / name).stat().st_size == size for name, size in files.items())


def open_entry(entry: Path, source: Source | TokenSource) -> Corpus:
    """Map the token files of a whole entry."""
    meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(entry)
    splits = {name: open_split(entry, name, meta["splits"][name], tokenizer) for name in SPLITS}
    notes = (*source.notes, *meta["notes"])
    return Corpus(source.name, splits, tokenizer, meta["sha256"], entry, notes)


def open_split(entry: Path, name: str, meta: dict[str, Any], tokenizer: Tokenizer) -> TokenFile:
    """Map the files of one split."""
    counts = {
        kind: np.memmap(entry / f"{name}.{kind}", np.dtype(meta[kind]), "r") if meta[kind] else None for kind in COUNTS
    }
    return TokenFile(
        name,
        np.memmap(entry / f"{name}.tokens", token_dtype(tokenizer.vocab_size), "r"),
        np.load(entry / f"{name}.documents.npy"),
        meta["bytes"],
        meta["words"],
        tokenizer,
        counts["covers"],
        counts["words_begun"],
    )


def write_entry(entry: Path, source: Source | TokenSource, config: DataConfig, progress: Progress | None) -> None:
    """Tokenize all splits into a temporary folder and rename it to `entry`. The caller holds the entry's lock."""
    for dead in entry.parent.glob(f".{entry.name}.*"):  # left by a process that was killed
        shutil.rmtree(dead)
    if entry.exists():
        shutil.rmtree(entry)  # damaged
    folder = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    try:
        if isinstance(source, TokenSource):
            meta = store_tokens(folder, source, config)
        else:
            meta = tokenize(folder, source, config, progress)
        files = {path.name: path.stat().st_size for path in folder.iterdir()}
        (folder / "meta.json").write_text(json.dumps({**meta, "files": files}, indent=1), encoding="utf-8")
        for path in [*folder.iterdir(), folder]:
            flush(path)
        folder.rename(entry)
        flush(entry.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tokenize(folder: Path, source: Source, config: DataConfig, progress: Progress | None) -> dict[str, Any]:
    """Write tokenizer and token files of all splits; what has to be known about them is returned."""
    border = border_of(config, reads_text=not reads_bytes(tokenizer_identity(config.tokenizer)))
    tokenizer = make_tokenizer(config.tokenizer, read_split(source, "train", config, border))
    if isinstance(tokenizer, IdTokenizer):
        raise ConfigError(
            f"data.tokenizer = {config.tokenizer}: is for tokens without text (a folder of train.bin); "
            f"data.source = {config.source} holds text"
        )
    tokenizer.save(folder)
    text_hash = hashlib.sha256()
    meta: dict[str, Any] = {"splits": {}, "notes": []}
    total, lost, unknown = 0, 0, 0
    for name in SPLITS:
        starts: list[NDArray[np.int64]] = []
        words, size, length = WordCounter(), 0, 0
        with (folder / f"{name}.tokens").open("wb") as file, Counts(folder, name) as counts:
            for group in groups(read_split(source, name, config, border)):
                begun = [words.read(piece) for piece in group]
                for piece in group:
                    text_hash.update(piece.text)
                    size += len(piece.text)
                encoded = tokenizer.encode_pieces(group)
                unknown += int((encoded.ids == tokenizer.unknown_id).sum()) if tokenizer.unknown_id is not None else 0
                lost += encoded.lost
                begins = np.array([piece.begins for piece in group])
                starts.append(length + (np.cumsum(encoded.lengths) - encoded.lengths)[begins])
                length += len(encoded.ids)
                encoded.ids.tofile(file)
                counts.add(group, encoded, begun)
                if progress is not None:
                    progress(name, size)
        if length == 0:
            raise ConfigError(f"data.source = {config.source}: no text for {name}; the corpus is too small to be split")
        documents = np.unique(np.concatenate(starts))  # a document without tokens begins where the next one does
        np.save(folder / f"{name}.documents.npy", documents[documents < length])
        word_count = 0 if reads_pictures(config) else words.words
        meta["splits"][name] = {"bytes": size, "words": word_count, **counts.dtypes}
        total += size
    if unknown:
        meta["notes"].append(f"{unknown:,} tokens are the tokenizer's unknown token: it lacks some of the characters")
    if lost:
        meta["notes"].append(
            f"{share(lost, total)} of the text does not come back from its tokens: {lost:,} of {total:,} bytes lie "
            "under tokens that stand for another text; bits per byte count the bytes that were read"
        )
    if config.tokenizer.startswith("bpe:") and tokenizer.vocab_size < int(config.tokenizer.removeprefix("bpe:")):
        meta["notes"].append(f"the text has pairs to merge for {tokenizer.vocab_size} tokens only")
    meta["notes"] += source.measured()
    return {**meta, "sha256": text_hash.hexdigest()}


def share(part: int, whole: int) -> str:
    """A share in per cent that is 0 or 100 % only where it is exactly that."""
    per_cent = 100 * part / whole
    rounded = f"{per_cent:.2f} %" if per_cent < 10 else f"{per_cent:.1f} %"
    if part and float(rounded[:-2]) == 0:
        return "less than 0.01 %"
    return "more than 99.9 %" if part < whole and float(rounded[:-2]) == 100 else rounded


class Counts:
    """Writes, beside the tokens of a split, the bytes and the beginnings of words under each of them.

    Bytes of pieces without a token belong to the next token, those at the end of the split to its last one. Nothing is
    written where a token is a byte.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.dtypes: dict[str, str | None] = dict.fromkeys(COUNTS)
        """Types of the files, once they are closed; None: there is none."""
        self._paths = [folder / f"{split}.{kind}" for kind in COUNTS]
        self._wide = [folder / f"{split}.{kind}.wide" for kind in COUNTS]
        self._waiting = np.zeros(2, np.int64)
        self._bytewise = False

    def __enter__(self) -> Counts:
        self._files = [path.open("w+b") for path in self._wide]
        return self

    def add(self, group: Sequence[Piece], encoded: Encoded, begun: Sequence[NDArray[np.int64]]) -> None:
        """Pieces, what they were encoded to, and the places in each at which words begin."""
        if encoded.covers is None:
            self._bytewise = True
            return
        at = 0
        for piece, length, words in zip(group, encoded.lengths.tolist(), begun, strict=True):
            covers = encoded.covers[at : at + length]
            at += length
            if not length:
                self._waiting += len(piece.text), len(words)
                continue
            ends = np.cumsum(covers)
            under = np.bincount(np.searchsorted(ends, words, side="right"), minlength=length)
            for file, numbers, more in zip(self._files, (covers, under), self._waiting, strict=True):
                wide = numbers.astype(np.uint32)
                wide[0] += more
                wide.tofile(file)
            self._waiting[:] = 0

    def __exit__(self, *_: object) -> None:
        for kind, path, wide, file, more in zip(
            COUNTS, self._paths, self._wide, self._files, self._waiting.tolist(), strict=True
        ):
            if file.tell() >= 4 and more:
                file.seek(-4, os.SEEK_END)
                last = np.fromfile(file, np.uint32, 1) + np.uint32(more)
                file.seek(-4, os.SEEK_END)
                last.tofile(file)
            file.close()
            if not self._bytewise and wide.stat().st_size:
                numbers = np.memmap(wide, np.uint32, "r")
                dtype = np.min_scalar_type(numbers.max())
                with path.open("wb") as narrow:
                    for at in range(0, len(numbers), GROUP):
                        numbers[at : at + GROUP].astype(dtype).tofile(narrow)
                self.dtypes[kind] = dtype.name
                del numbers
            wide.unlink()


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


class WordCounter:
    """Counts words, separated by ASCII white space, over pieces: a word may go on in the next piece."""

    SPACE = np.isin(np.arange(256), np.frombuffer(b" \t\n\r\v\f", np.uint8))

    def __init__(self) -> None:
        self.words = 0
        self._after_space = True

    def read(self, piece: Piece) -> NDArray[np.int64]:
        """Count the words that begin in this piece; the places of their first bytes are returned."""
        if not piece.text:
            return np.empty(0, np.int64)
        space = self.SPACE[np.frombuffer(piece.text, np.uint8)]
        before = self._after_space or piece.begins
        places = np.flatnonzero(~space & np.concatenate([[before], space[:-1]]))
        self.words += len(places)
        self._after_space = bool(space[-1])
        return places


def flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk (a folder can be opened on POSIX only)."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
