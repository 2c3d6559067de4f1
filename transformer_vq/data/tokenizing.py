"""Tokenizing a corpus, group by group: memory does not grow with the text, and after a kill the next process goes on.

    tokenizer.json, {train,valid,test}.tokens, .documents.npy, .covers, .words_begun    as store.py has them
    SPLIT.starts (int64), SPLIT.KIND.wide (uint32)    while a split is written: where documents begin, and counts
    progress.json                                     how far it is: what was written until then is on the disk

Going on does not tokenize what is tokenized. Files are read again, for their hash; a dataset is read from where it was
(places.py), so its hash is a chain over groups, h ← sha256(h, group), of which the last link is all that is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
from transformer_vq.data.places import Place, Reading, Stream, is_stream, total_of
from transformer_vq.data.sources import Source
from transformer_vq.data.tokenizers import (
    IdTokenizer,
    Tokenizer,
    load_tokenizer,
    make_tokenizer,
    reads_bytes,
    tokenizer_identity,
)
from transformer_vq.data.writing import Done, Writer

GROUP = 1 << 22
"""Bytes that are tokenized at once."""
OFTEN = 10.0  # seconds between two entries in the journal
JOURNAL = "progress.json"

Progress = Callable[[str, int], None]
"""Called with a split's name and the bytes read of it so far."""


@dataclass
class Noted:
    """What the journal says."""

    splits: dict[str, Done] = field(default_factory=dict)
    link: str = ""
    """Of a dataset: the last link of the chain of hashes, hexadecimal."""
    total: int | None = None
    """Bytes of what the splits are carved off, where it was measured."""


def tokenize(folder: Path, source: Source, config: DataConfig, progress: Progress | None) -> dict[str, Any]:
    """Write tokenizer and token files of all splits; what has to be known about them is returned.

    folder: empty, or where a process that read the same was killed; a journal is left behind.
    """
    border = border_of(config, reads_text=not reads_bytes(tokenizer_identity(config.tokenizer)))
    journal, noted, total = folder / JOURNAL, Noted(), total_of(source.splits["train"])
    if journal.is_file():
        noted, tokenizer = read_journal(journal), load_tokenizer(folder)
        total.known = noted.total
    else:
        tokenizer = make_tokenizer(config.tokenizer, read_split(source, "train", config, border))
        if isinstance(tokenizer, IdTokenizer):
            raise ConfigError(
                f"data.tokenizer = {config.tokenizer}: is for tokens without text (a folder of train.bin); "
                f"data.source = {config.source} holds text"
            )
        tokenizer.save(folder)
    goes_on = is_stream(source.splits["train"])
    text_hash = hashlib.sha256(bytes.fromhex(noted.link))
    for name in SPLITS:
        mine = noted.splits.setdefault(name, Done())
        with Writer(folder, name, tokenizer, mine) as out:
            known = mine.groups if goes_on else 0  # groups that are not read again
            size, last = mine.bytes if known else 0, time.monotonic()
            reading = open_reading(source, name, config, border, mine)
            for i, group in enumerate(groups(reading), known):
                for piece in group:
                    text_hash.update(piece.text)
                    size += len(piece.text)
                if i >= mine.groups:
                    out.add(group)
                    if goes_on:
                        noted.link, text_hash = text_hash.hexdigest(), hashlib.sha256(text_hash.digest())
                        mine.place = None if reading.place is None else [*reading.place, reading.since]
                    if time.monotonic() - last >= OFTEN:
                        noted.total = total.known
                        out.sync()
                        note(journal, noted)
                        last = time.monotonic()
                if progress is not None:
                    progress(name, size)
            if mine.tokens == 0:
                raise ConfigError(
                    f"data.source = {config.source}: no text for {name}; the corpus is too small to be split"
                )
            if mine.dtypes is None:
                noted.total = total.known
                out.sync()
                note(journal, noted)
                out.finish()
                note(journal, noted)
        out.forget()
    pictures = reads_pictures(config)
    splits = {
        name: {"bytes": one.bytes, "words": 0 if pictures else one.words, **(one.dtypes or {})}
        for name, one in noted.splits.items()
    }
    sha256 = noted.link if goes_on else text_hash.hexdigest()
    return {"splits": splits, "notes": notes(noted.splits, config, tokenizer, source), "sha256": sha256}


def open_reading(source: Source, name: str, config: DataConfig, border: Border, done: Done) -> Reading:
    """What is left of a split that can be gone on from, of any other all of it."""
    stream = source.splits[name]
    if done.place is None:
        return Reading(stream, read_split(source, name, config, border))
    at, before, since = done.place
    place = Place(at, before)
    if done.dtypes is not None:  # the split is done, and the next one may begin here
        assert isinstance(stream, Stream), "only streams note places"
        stream.place = place
        return Reading(stream, iter(()))
    return Reading(stream, read_split(source, name, config, border, place), since)


def read_journal(journal: Path) -> Noted:
    """What a process noted that was killed."""
    kept: dict[str, Any] = json.loads(journal.read_text(encoding="utf-8"))
    return Noted(**kept | {"splits": {name: Done(**values) for name, values in kept["splits"].items()}})


def note(journal: Path, noted: Noted) -> None:
    """Write the journal, in one piece. What it speaks of is on the disk."""
    beside = journal.with_suffix(".new")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(asdict(noted), file)
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


def read_split(
    source: Source, name: str, config: DataConfig, border: Border, place: Place | None = None
) -> Iterator[Piece]:
    """The pieces of a split, at most `max_bytes` (`max_eval_bytes`) of them, documents split at the separator.

    place: where a dataset is gone on from.
    """
    stream, passed = source.splits[name], 0
    if place is None:
        pieces = stream()
    else:
        assert isinstance(stream, Stream), "only streams have places"
        pieces, passed = stream(place), stream.before(place) or 0
    limits = [config.max_bytes, None if name == "train" else config.max_eval_bytes]
    for limit in filter(None, limits):
        pieces = take(pieces, 0, limit - passed, border)
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
