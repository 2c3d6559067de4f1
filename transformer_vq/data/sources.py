"""What every kind of source is made of: splits that can be read, a hash of their content, and files found by name.

A split is named by a whole word, in any case: `Train.txt`, `my-training_set/`, `dev2.jsonl`, but not `constraint.txt`.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformer_vq.config import ConfigError
from transformer_vq.config.explain import some
from transformer_vq.data.documents import SPLITS, Border, Pieces
from transformer_vq.data.places import carve

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

READING = b"text as of 2"
"""Changes when other text is read out of the same files, or other splits are made of it."""

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
    measured: Callable[[], tuple[str, ...]] = tuple
    """Notes that can be made once the text is read."""


def split_name(path: Path) -> str | None:
    """The split that a relative path names: the outermost of its parts with a split's word decides.

    A part with the words of two splits, like `train_test.txt`, names none.
    """
    for part in path.parts:
        named = {SPLIT_WORDS[word] for word in words_of(part) if word in SPLIT_WORDS}
        if len(named) == 1:
            return named.pop()
    return None


def words_of(name: str) -> list[str]:
    """The words of a name in lower case: runs of letters, cut where CamelCase cuts them."""
    return [word.lower() for word in _WORD.findall(name)]


def complete(splits: dict[str, Pieces], border: Border) -> tuple[dict[str, Pieces], tuple[str, ...]]:
    """Carve the splits that are missing off the end of train; say so."""
    missing = tuple(split for split in SPLITS if split not in splits)
    if not missing:
        return splits, ()
    splits = {**splits, **carve(splits["train"], ("train", *missing), border)}
    note = f"{' and '.join(missing)} carved off the end of train, 5 % each"
    return {split: splits[split] for split in SPLITS}, (note,)


@dataclass(frozen=True)
class Found:
    """What is under a folder."""

    files: list[Path]
    """Sorted by path, each content once."""
    notes: tuple[str, ...]
    """What was left out, a sentence each."""


def walk(root: Path, skip: frozenset[str]) -> list[Path]:
    """All files under a folder but those in folders named in `skip` or hidden; see `explore`."""
    return explore(root, skip).files


def explore(root: Path, skip: frozenset[str]) -> Found:
    """All files under a folder but those in folders named in `skip` or hidden.

    Links are followed, once what they lead to was not met yet: no circle, and no file by two names. Raises ConfigError
    for what cannot be entered, for a link to nothing and for what is neither file nor folder.
    """
    met: set[tuple[int, int]] = set()
    files: list[Path] = []
    twice: list[str] = []
    above = {identity_of(folder) for folder in root.resolve().parents}
    inner: list[Path] = [root]
    links: list[Path] = []
    while inner or links:
        folder = inner.pop() if inner else links.pop(0)
        place = identity_of(folder)
        if place in met or place in above:
            twice += [folder.relative_to(root).as_posix() + "/"]
            continue
        met.add(place)
        for path in entries_of(folder):
            try:
                mode = path.stat().st_mode
            except OSError as error:
                raise ConfigError(f"data.source: {path} is not readable: {error.strerror or error}") from None
            if stat.S_ISDIR(mode):
                if path.name not in skip and not path.name.startswith("."):
                    (links if path.is_symlink() else inner).append(path)
            elif stat.S_ISREG(mode):
                files.append(path)
            elif not path.name.startswith("."):
                raise ConfigError(f"data.source: {path} is neither a file nor a folder; move it away")
        links.sort()
    kept: dict[tuple[int, int], Path] = {}
    for path in sorted(files, key=lambda path: (path != path.resolve(), path)):  # a link counts where nothing else does
        if kept.setdefault(identity_of(path), path) is not path:
            twice.append(path.relative_to(root).as_posix())
    notes = (f"read once, though named twice by links: {some(sorted(twice))}",) if twice else ()
    return Found(sorted(kept.values()), notes)


def entries_of(folder: Path) -> list[Path]:
    """What a folder holds, sorted.  Raises ConfigError where it cannot be entered."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"data.source: {folder} cannot be entered: {error.strerror or error}") from None


def identity_of(path: Path) -> tuple[int, int]:
    """The same for two paths to one file or folder."""
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigError(f"data.source: {path} is not readable: {error.strerror or error}") from None
    return found.st_dev, found.st_ino


def hash_files(root: Path, files: Sequence[Path]) -> str:
    """sha256 over relative path, size and content of files, as on the disk.  Raises ConfigError where unreadable."""
    total = hashlib.sha256(READING)
    for path in files:
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            name = os.fsencode(path.relative_to(root).as_posix())  # on Linux it need not be UTF-8
            total.update(name + f"\0{path.stat().st_size}\0{content}\n".encode())
        except OSError as error:
            raise ConfigError(f"data.source: {path} is not readable: {error}") from None
    return total.hexdigest()
