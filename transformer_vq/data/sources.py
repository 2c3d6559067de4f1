"""What every kind of source is made of: splits that can be read, a hash of their content, and files found by name.

A split is named by a whole word, in any case: `Train.txt`, `my-training_set/`, `dev2.jsonl`, but not `constraint.txt`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformer_vq.config import ConfigError
from transformer_vq.data.documents import SPLITS, Border, Pieces, carve

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "valid",
    "valid": "valid",
    "validation": "valid",
    "dev": "valid",
    "test": "test",
    "testing": "test",
}
"""Words that name a split, in the names of files, folders, arrays and a dataset's own splits."""

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")  # letters, cut where CamelCase cuts them


@dataclass(frozen=True)
class Source:
    """An opened `data.source`."""

    name: str
    """A phrase that says what it is."""
    fingerprint: str
    """sha256 of everything that decides which text is in which split."""
    splits: dict[str, Pieces]
    """train, valid, test."""
    notes: tuple[str, ...] = ()
    """What was decided for the user, a sentence each."""


def split_name(path: Path) -> str | None:
    """The split that a relative path names: the outermost of its parts with a split's word decides.

    A part with the words of two splits, like `train_test.txt`, names none.
    """
    for part in path.parts:
        named = {SPLIT_WORDS[word.lower()] for word in _WORD.findall(part) if word.lower() in SPLIT_WORDS}
        if len(named) == 1:
            return named.pop()
    return None


def complete(splits: dict[str, Pieces], border: Border) -> tuple[dict[str, Pieces], tuple[str, ...]]:
    """Carve the splits that are missing off the end of train; say so."""
    missing = tuple(split for split in SPLITS if split not in splits)
    if not missing:
        return splits, ()
    splits = {**splits, **carve(splits["train"], ("train", *missing), border)}
    note = f"{' and '.join(missing)} carved off the end of train, 5 % each"
    return {split: splits[split] for split in SPLITS}, (note,)


def walk(root: Path, skip: frozenset[str]) -> list[Path]:
    """All files under a folder but those in folders named in `skip` or hidden, sorted by path."""
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        files += [Path(folder, name) for name in names]
    return sorted(path for path in files if path.is_file())


def hash_files(root: Path, files: Sequence[Path]) -> str:
    """sha256 over relative path, size and content of files, as on the disk.  Raises ConfigError where unreadable."""
    total = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0{content}\n".encode())
        except OSError as error:
            raise ConfigError(f"data.source: {path} is not readable: {error}") from None
    return total.hexdigest()
