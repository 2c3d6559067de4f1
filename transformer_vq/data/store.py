"""Token files: a corpus tokenized once, memory-mapped afterwards.

    CACHE/KEY/meta.json, tokenizer.json, {train,valid,test}.tokens (raw, smallest unsigned type), .documents.npy (int64)
    and, where a token is not a byte, .covers and .words_begun: bytes of the text and words that begin under each token
    KEY = hash of (format, the source's content and splits, tokenizer, the settings of `data` that change tokens)

An entry is written into a folder `.KEY.part` beside it, flushed to the disk and renamed, under a lock: a folder with a
KEY is whole, whatever was killed and however many processes race. How it is written: tokenizing.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from transformer_vq.config import ConfigError, DataConfig
from transformer_vq.data.cache import cache_of
from transformer_vq.data.corpora import open_source
from transformer_vq.data.documents import SPLITS, Piece, border_of, separator_of
from transformer_vq.data.sources import Source
from transformer_vq.data.token_files import TokenSource, holds_tokens, open_tokens, store_tokens
from transformer_vq.data.tokenizers import Tokenizer, load_tokenizer, reads_bytes, token_dtype, tokenizer_identity
from transformer_vq.data.tokenizing import JOURNAL, Progress, tokenize
from transformer_vq.data.words import WordCounter
from transformer_vq.data.writing import COUNTS
from transformer_vq.files import room

FORMAT = 3
META = "meta.json"
SOME = 1 << 20
"""Documents that are looked at at once."""


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
        last = len(self) - int(self.documents[-1])
        return last <= length and all(
            bool(np.all(np.diff(self.documents[at : at + SOME + 1]) == length))
            for at in range(0, len(self.documents) - 1, SOME)
        )

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
    """Of the text of train, valid and test in a row: of a file split by position, the hash of that file; of a dataset
    a chain of hashes, see tokenizing.py."""
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
    if not (entry / META).is_file():
        return False
    files: dict[str, int] = json.loads((entry / META).read_text(encoding="utf-8"))["files"]
    return all((entry / name).is_file() and (entry / name).stat().st_size == size for name, size in files.items())


def open_entry(entry: Path, source: Source | TokenSource) -> Corpus:
    """Map the token files of a whole entry."""
    meta = json.loads((entry / META).read_text(encoding="utf-8"))
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
        np.load(entry / f"{name}.documents.npy", "r"),
        meta["bytes"],
        meta["words"],
        tokenizer,
        counts["covers"],
        counts["words_begun"],
    )


def write_entry(entry: Path, source: Source | TokenSource, config: DataConfig, progress: Progress | None) -> None:
    """Tokenize all splits into a folder beside `entry` and rename it. The caller holds the entry's lock.

    What an error has stopped is removed; what was killed or interrupted is gone on from.
    """
    if entry.exists():
        shutil.rmtree(entry)  # damaged
    folder = entry.with_name(f".{entry.name}.part")
    for dead in entry.parent.glob(f".{entry.name}.*"):  # where nothing was noted yet, or by an earlier version
        if dead != folder or not (folder / JOURNAL).is_file():
            shutil.rmtree(dead)
    folder.mkdir(exist_ok=True)
    try:
        if isinstance(source, TokenSource):
            meta = store_tokens(folder, source, config)
        else:
            meta = tokenize(folder, source, config, progress)
        kept = [path for path in sorted(folder.iterdir()) if path.name not in (JOURNAL, META)]
        files = {path.name: path.stat().st_size for path in kept}
        (folder / META).write_text(json.dumps({**meta, "files": files}, indent=1), encoding="utf-8")
        for path in [*folder.iterdir(), folder]:
            flush(path)
        (folder / JOURNAL).unlink(missing_ok=True)
        folder.rename(entry)
        flush(entry.parent)
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk (a folder can be opened on POSIX only)."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
