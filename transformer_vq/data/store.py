"""Token files: a corpus tokenized once, memory-mapped afterwards.

    CACHE/KEY/meta.json, tokenizer.json, {train,valid,test}.tokens (raw, smallest unsigned type), .documents.npy (int64)
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from transformer_vq.config import ConfigError, DataConfig
from transformer_vq.data.cache import cache_of
from transformer_vq.data.corpora import Source, open_source
from transformer_vq.data.documents import (
    SPLITS,
    Piece,
    border_of,
    reads_pictures,
    separator_of,
    split_at_separator,
    take,
)
from transformer_vq.data.tokenizers import (
    Tokenizer,
    load_tokenizer,
    make_tokenizer,
    reads_bytes,
    token_dtype,
    tokenizer_identity,
)
from transformer_vq.files import room

FORMAT = 2
GROUP = 1 << 22
"""Bytes that are tokenized at once."""

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
    bytes: int
    """Of the text behind all tokens, for bits per byte."""
    words: int
    """Of that text, separated by white space, for the perplexity per word; 0 of pictures."""
    tokenizer: Tokenizer

    def __len__(self) -> int:
        return len(self.tokens)

    def documents_have(self, length: int) -> bool:
        """Every document has `length` tokens, as pictures of one size have; the last one may be cut short."""
        lengths = np.diff(self.documents, append=len(self))
        return bool(np.all(lengths[:-1] == length) and lengths[-1] <= length)

    def head(self, count: int) -> TokenFile:
        """The first `count` tokens. Their bytes and words are those of the decoded text."""
        if count >= len(self):
            return self
        text = self.tokenizer.decode_bytes(self.tokens[:count].tolist())
        counter = WordCounter()
        counter.read(Piece(text, True, self.name, 0))
        documents = self.documents[: np.searchsorted(self.documents, count)]
        words = counter.words if self.words else 0
        return replace(self, tokens=self.tokens[:count], documents=documents, bytes=len(text), words=words)


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
            f"{name} {file.bytes:,} bytes, {len(file):,} tokens, {len(file.documents):,} documents"
            for name, file in self.splits.items()
        )
        notes = "".join(f" {note[0].upper()}{note[1:]}." for note in self.notes)
        return f"{self.name}: {sizes}. Tokenizer: {self.tokenizer.name}. sha256 of the text: {self.sha256}.{notes}"


def prepare(config: DataConfig, progress: Progress | None = None) -> Corpus:
    """Tokenize a corpus, or find it tokenized.  Raises ConfigError, one line, and leaves nothing half-written."""
    identity = tokenizer_identity(config.tokenizer)
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
        if limit is not None and all(corpus.splits[name].bytes < limit for name in limited):
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


def open_entry(entry: Path, source: Source) -> Corpus:
    """Map the token files of a whole entry."""
    meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(entry)
    splits = {
        name: TokenFile(
            name,
            np.memmap(entry / f"{name}.tokens", token_dtype(tokenizer.vocab_size), "r"),
            np.load(entry / f"{name}.documents.npy"),
            meta["splits"][name]["bytes"],
            meta["splits"][name]["words"],
            tokenizer,
        )
        for name in SPLITS
    }
    notes = (*source.notes, *meta["notes"])
    return Corpus(source.name, splits, tokenizer, meta["sha256"], entry, notes)


def write_entry(entry: Path, source: Source, config: DataConfig, progress: Progress | None) -> None:
    """Tokenize all splits into a temporary folder and rename it to `entry`. The caller holds the entry's lock."""
    for dead in entry.parent.glob(f".{entry.name}.*"):  # left by a process that was killed
        shutil.rmtree(dead)
    if entry.exists():
        shutil.rmtree(entry)  # damaged
    folder = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    try:
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
    tokenizer = make_tokenizer(config.tokenizer, read_split(source, "train", config))
    tokenizer.save(folder)
    text_hash = hashlib.sha256()
    meta: dict[str, Any] = {"splits": {}, "notes": []}
    unknown = 0
    for name in SPLITS:
        starts: list[NDArray[np.int64]] = []
        words, size, length = WordCounter(), 0, 0
        with (folder / f"{name}.tokens").open("wb") as file:
            for group in groups(read_split(source, name, config)):
                for piece in group:
                    text_hash.update(piece.text)
                    words.read(piece)
                    size += len(piece.text)
                ids, lengths = tokenizer.encode_pieces(group)
                unknown += int((ids == tokenizer.unknown_id).sum()) if tokenizer.unknown_id is not None else 0
                begins = np.array([piece.begins for piece in group])
                starts.append(length + (np.cumsum(lengths) - lengths)[begins])
                length += len(ids)
                ids.tofile(file)
                if progress is not None:
                    progress(name, size)
        if length == 0:
            raise ConfigError(f"data.source = {config.source}: no text for {name}; the corpus is too small to be split")
        documents = np.unique(np.concatenate(starts))  # a document without tokens begins where the next one does
        np.save(folder / f"{name}.documents.npy", documents[documents < length])
        meta["splits"][name] = {"bytes": size, "words": 0 if reads_pictures(config) else words.words}
    if unknown:
        meta["notes"].append(f"{unknown:,} tokens are the tokenizer's unknown token: it lacks some of the characters")
    if config.tokenizer.startswith("bpe:") and tokenizer.vocab_size < int(config.tokenizer.removeprefix("bpe:")):
        meta["notes"].append(f"the text has pairs to merge for {tokenizer.vocab_size} tokens only")
    meta["notes"] += source.measured()
    return {**meta, "sha256": text_hash.hexdigest()}


def read_split(source: Source, name: str, config: DataConfig) -> Iterator[Piece]:
    """The pieces of a split, at most `max_bytes` (`max_eval_bytes`) of them, documents split at the separator."""
    pieces = source.splits[name]()
    limits = [config.max_bytes, None if name == "train" else config.max_eval_bytes]
    border = border_of(config, reads_text=not reads_bytes(config.tokenizer))
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

    def read(self, piece: Piece) -> None:
        """Count the words that begin in this piece."""
        if not piece.text:
            return
        space = self.SPACE[np.frombuffer(piece.text, np.uint8)]
        before = self._after_space or piece.begins
        self.words += int((space[:-1] & ~space[1:]).sum()) + int(before and not space[0])
        self._after_space = bool(space[-1])


def flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk (a folder can be opened on POSIX only)."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
