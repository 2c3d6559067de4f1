"""Folders of tokens that another program made: `train.bin`, `val.bin`, raw ids one after another [nanoGPT].

    type       uint16, of a vocabulary beyond 65,536 uint32, little-endian; a header of llm.c's is left out
    splits     by the words of the files' names, several files in the order of these; those that are missing are carved
               off the end of train, 5 % each, as of text
    documents  end with the tokenizer's end of text, or with `data.document_separator` where that is given
    bytes      those that the tokens spell, control tokens none, where a token spells the same wherever it stands;
               else they are not known, and nothing is said per byte
A `meta.pkl` beside them is never opened: what it says is said by `data.tokenizer`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transformer_vq.config import ConfigError, DataConfig
from transformer_vq.data.documents import SPLITS, separator_of
from transformer_vq.data.sources import hash_files, split_name
from transformer_vq.data.tokenizers import Tokenizer, make_tokenizer, token_dtype

ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
HEADER = 1024  # bytes of llm.c's header: 256 int32, of which the first is MAGIC and the third counts the tokens
MAGIC = 20240520
CHUNK = 1 << 22  # tokens that are read at once

Tokens = NDArray[np.unsignedinteger]


class Stretch(NamedTuple):
    """Some tokens of a file in a row."""

    path: Path
    first: int
    """Position of the first of them in the file."""
    tokens: Tokens


class TokenSource(NamedTuple):
    """An opened folder of tokens."""

    name: str
    fingerprint: str
    splits: dict[str, list[Stretch]]
    """Stretches of files, memory-mapped."""
    notes: tuple[str, ...]


def holds_tokens(source: str) -> bool:
    """A folder in which a `.bin` file is named as train."""
    return any(split_name(Path(path.name)) == "train" for path in _files(Path(source).expanduser()))


def open_tokens(config: DataConfig) -> TokenSource:
    """Find the token files of `data.source`.  Raises ConfigError for a file that holds no whole tokens."""
    root = Path(config.source).expanduser()
    if config.tokenizer == "bytes" or config.tokenizer.startswith("bpe:"):
        raise ConfigError(
            f"data.tokenizer = {config.tokenizer}: {root} holds tokens (.bin); say which tokenizer made them, or "
            "tokens:SIZE, the size of its vocabulary (bytes+0 where a token is a byte)"
        )
    tokenizer = make_tokenizer(config.tokenizer, [])
    kind = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    files = _files(root)
    named: dict[str, list[Stretch]] = {}
    for path in files:
        if split := split_name(Path(path.name)):
            named.setdefault(split, []).append(Stretch(path, 0, _map(path, kind)))
    used = [path for parts in named.values() for path, _, _ in parts]
    notes = [f"tokens of {kind.name} in {', '.join(path.name for path in sorted(used))}"]
    missing = [split for split in SPLITS if split not in named]
    total = sum(len(tokens) for _, _, tokens in named["train"])
    train = named["train"]
    for n, split in enumerate(reversed(missing), 1):
        start = total * (100 - 5 * n) // 100
        named[split] = _stretch(train, start, total * (105 - 5 * n) // 100)
        named["train"] = _stretch(train, 0, start)
    if missing:
        notes.append(f"{' and '.join(missing)} carved off the end of train, 5 % each")
    if others := sorted(path.name for path in root.iterdir() if path not in used and not path.name.startswith(".")):
        notes.append(f"not read: {', '.join(others)}")
    if tokenizer.spelled() is None:
        notes.append("the text behind the tokens is not known: bits per token, none per byte")
    else:
        notes.append("bytes are those that the tokens spell, control tokens none")
    if config.max_bytes or config.max_eval_bytes:
        notes.append("data.max_bytes and max_eval_bytes count the bytes of the token files")
    return TokenSource(str(root), hash_files(root, used), {split: named[split] for split in SPLITS}, tuple(notes))


def store_tokens(folder: Path, source: TokenSource, config: DataConfig) -> dict[str, Any]:
    """Write tokenizer and token files of all splits; what has to be known about them is returned, as `tokenize` does.

    Raises ConfigError naming file and position of an id that the vocabulary does not have.
    """
    tokenizer = make_tokenizer(config.tokenizer, [])
    tokenizer.save(folder)
    spelled, end, total = tokenizer.spelled(), _end(tokenizer, config), hashlib.sha256()
    meta: dict[str, Any] = {"splits": {}, "notes": []}
    for name, stretches in source.splits.items():
        starts, length, size = [np.zeros(1, np.int64)], 0, 0
        limits = [config.max_bytes, None if name == "train" else config.max_eval_bytes]
        most = min((limit for limit in limits if limit), default=None)
        covers = None if spelled is None else np.min_scalar_type(int(spelled.max()))
        with (folder / f"{name}.tokens").open("wb") as file, (folder / f"{name}.covers").open("wb") as under:
            for ids in _chunks(stretches, tokenizer.vocab_size, most):
                total.update(ids.tobytes())
                ids.astype(token_dtype(tokenizer.vocab_size)).tofile(file)
                if spelled is not None:
                    spells = spelled[ids]
                    spells.astype(covers).tofile(under)
                    size += int(spells.sum())
                if end is not None:
                    starts.append(length + 1 + np.flatnonzero(ids == end))
                length += len(ids)
        if length == 0:
            raise ConfigError(f"data.source = {config.source}: no tokens for {name}")
        if covers is None:
            (folder / f"{name}.covers").unlink()
        documents = np.concatenate(starts)
        np.save(folder / f"{name}.documents.npy", documents[documents < length])
        kinds = {"covers": None if covers is None else covers.name, "words_begun": None}
        meta["splits"][name] = {"bytes": None if covers is None else size, "words": 0, **kinds}
    return {**meta, "sha256": total.hexdigest()}


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("*.bin") if path.is_file()) if root.is_dir() else []


def _map(path: Path, kind: np.dtype[Any]) -> Tokens:
    try:
        with path.open("rb") as file:
            start = file.read(12)
        head = np.frombuffer(start.ljust(12, b"\0"), "<i4")
        skip = HEADER if head[0] == MAGIC else 0
        size = path.stat().st_size - skip
        if size < kind.itemsize or size % kind.itemsize or (skip and size != int(head[2]) * kind.itemsize):
            raise ConfigError(f"data.source: {path} has {size:,} bytes, which are no whole {kind.name} tokens")
        return np.memmap(path, kind, "r", offset=skip)
    except OSError as error:
        raise ConfigError(f"data.source: {path} is not readable: {error}") from None


def _stretch(parts: list[Stretch], start: int, stop: int) -> list[Stretch]:
    """Tokens [start, stop) of files in a row."""
    found, at = [], 0
    for path, first, tokens in parts:
        low, high = max(start - at, 0), max(stop - at, 0)
        at += len(tokens)
        if low < min(high, len(tokens)):
            found.append(Stretch(path, first + low, tokens[low:high]))
    return found


def _chunks(stretches: list[Stretch], vocab_size: int, most: int | None) -> Iterator[Tokens]:
    """Ids that the vocabulary has; `most`: so many bytes of the files."""
    for path, first, tokens in stretches:
        kept = tokens if most is None else tokens[: max(most // tokens.itemsize, 0)]
        most = None if most is None else most - kept.nbytes
        for at in range(0, len(kept), CHUNK):
            ids = np.asarray(kept[at : at + CHUNK])
            if len(wrong := np.flatnonzero(ids >= vocab_size)):
                place = first + at + int(wrong[0])
                raise ConfigError(
                    f"data.source: {path} has id {ids[wrong[0]]} as token {place:,} (counted from 0); data.tokenizer "
                    f"has ids below {vocab_size:,}"
                )
            yield ids


def _end(tokenizer: Tokenizer, config: DataConfig) -> int | None:
    """The id that ends a document; None: not known, a split is one document.  Raises ConfigError."""
    if (separator := separator_of(config)) is not None:
        ids = tokenizer.encode(separator.decode())
        if len(ids) != 1:
            raise ConfigError(
                f"data.document_separator = {config.document_separator}: must be one token to end documents of tokens; "
                f"it is {len(ids)}"
            )
        return ids[0]
    if tokenizer.spelled() is None and tokenizer.name.startswith("tokens:"):
        return None
    for text in ENDS:
        ids = tokenizer.encode(text)
        if len(ids) == 1 and ids[0] != tokenizer.unknown_id:
            return ids[0]
    return None
