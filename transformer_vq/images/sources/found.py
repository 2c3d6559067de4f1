"""What every kind of source finds, how a split that is missing is drawn from another, and hashes of files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from transformer_vq.config import ConfigError
from transformer_vq.data.documents import SPLITS
from transformer_vq.images.pictures import Pictures, Selected, Shape

HELD_OUT = 20  # one picture of so many
MOST_HELD_OUT = 5000


@dataclass(frozen=True)
class Found:
    """Splits as a source has them."""

    name: str
    splits: dict[str, Pictures]
    shape: Shape
    sha256: str
    notes: tuple[str, ...] = ()
    """What the user should hear about the source: what was left out or decided."""
    divide: Callable[[int], NDArray[np.int64]] | None = None
    """Number of pictures -> a key per picture by which a single split is divided; None: a fixed draw."""


def divide(found: Found) -> tuple[dict[str, Pictures], tuple[str, ...]]:
    """Train, valid and test of what was found, and what is to be said about where they come from.

    Of train and one other, the other is the test split and a twentieth of train, 5,000 at most, is held out as valid.
    All in one: as much again is held out as test. Raises ConfigError for two splits without train.
    """
    given = found.splits
    if set(given) == set(SPLITS):
        return {name: given[name] for name in SPLITS}, ()
    if "train" not in given and len(given) > 1:
        raise ConfigError(f"data.source = {found.name}: it has {' and '.join(given)}, and no train")
    first = "train" if "train" in given else next(iter(given))
    train, n = given[first], len(given[first])
    other = next((name for name in given if name != first), None)
    keys = (found.divide or uniform)(n) if other is None else uniform(n)
    order = np.argsort(keys, kind="stable")
    held = min(max(1, n // HELD_OUT), MOST_HELD_OUT)
    if other is None:
        test, valid, rest = (np.sort(part) for part in np.split(order, [held, 2 * held]))
        how = f"of {n:,} pictures{'' if first == 'train' else f' of {first}'}, valid and test are {held:,} each"
        return {"train": Selected(train, rest), "valid": Selected(train, valid), "test": Selected(train, test)}, (how,)
    valid, rest = (np.sort(part) for part in np.split(order, [held]))
    how = f"valid is {held:,} of the {n:,} pictures of train" + ("" if other == "test" else f", {other} serves as test")
    return {"train": Selected(train, rest), "valid": Selected(train, valid), "test": given[other]}, (how,)


def uniform(n: int) -> NDArray[np.int64]:
    """A key for each of n pictures, always the same."""
    return np.random.default_rng(0).integers(2**32, size=n)


def draw(n: int, count: int) -> NDArray[np.int64]:
    """`count` of n places, always the same, in order."""
    return np.sort(np.random.default_rng(0).permutation(n)[:count])


def hash_contents(root: Path, files: Sequence[Path]) -> str:
    """sha256 of one file's content; of several, over relative path and content of each.  Raises ConfigError."""
    digests = []
    for path in files:
        try:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise ConfigError(f"data.source: {path} is not readable: {error}") from None
    if len(files) == 1:
        return digests[0]
    return _hash_lines(root, files, digests)


def hash_sizes(root: Path, files: Sequence[Path]) -> str:
    """The same over relative path and size."""
    return _hash_lines(root, files, [str(path.stat().st_size) for path in files])


def _hash_lines(root: Path, files: Sequence[Path], values: Sequence[str]) -> str:
    total = hashlib.sha256()
    for path, value in zip(files, values, strict=True):
        total.update(path_bytes(path.relative_to(root)) + f"\0{value}\n".encode())
    return total.hexdigest()


def path_bytes(relative: Path) -> bytes:
    """A path as bytes, whatever its name: on Linux it need not be UTF-8."""
    return os.fsencode(relative.as_posix())
