"""Which documents of a folder or an archive are train, valid and test: by their names, by a hash, or by position.

by name      some name train and others valid or test; then every one must name its split, README and the like aside
by a hash    of the path: whole documents, as long as valid and test come within a factor of two of 5 % each
by position  in that order, where whole documents do not come so near: one long file and some short ones
"""

from __future__ import annotations

import hashlib
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from pathlib import Path

from transformer_vq.config import ConfigError
from transformer_vq.config.explain import some
from transformer_vq.data.documents import SPLITS, Border, Piece, Pieces
from transformer_vq.data.places import carve
from transformer_vq.data.sources import complete, split_name

ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|authors|changelog|changes|sha256sums|md5sums)\b.*", re.I
)
"""Names of files that are about a corpus, not of it."""


@dataclass(frozen=True)
class Collection:
    """Documents that can be read by name."""

    where: str
    sizes: Mapping[str, int | None]
    """Name, a relative path, and bytes of text where these are known without reading."""
    read: Callable[[Sequence[str]], Iterator[Piece]]
    """Some of them, in the order given or in its own."""


@dataclass(frozen=True)
class Division:
    """How documents were shared out."""

    splits: dict[str, Pieces]
    used: tuple[str, ...]
    notes: tuple[str, ...] = ()
    measured: Callable[[], tuple[str, ...]] = tuple


def divide(documents: Collection, border: Border) -> Division:
    """Train, valid and test.  Raises ConfigError where names leave some documents without a split."""
    names = list(documents.sizes)
    named, notes = by_name(names, documents.where)
    if named:
        splits: dict[str, Pieces] = {split: partial(documents.read, some_) for split, some_ in named.items()}
        whole, more = complete(splits, border)
        used = tuple(name for split in SPLITS for name in named.get(split, ()))
        return Division(whole, used, ("split by the files' names", *notes, *more))
    if len(names) < 3:
        splits = carve(lambda: documents.read(names), SPLITS, border)
        words = {1: "", 2: "two files, "}[len(names)]
        return Division(splits, tuple(names), (f"{words}split 90/5/5 by position", *notes))

    @cache
    def plan() -> tuple[dict[str, Pieces], str]:
        sizes = {
            name: sum(len(piece.text) for piece in documents.read([name])) if size is None else size
            for name, size in documents.sizes.items()
        }
        return by_hash_or_position(sizes, documents.read, border)

    splits = {split: (lambda split=split: plan()[0][split]()) for split in SPLITS}  # type: ignore[misc]
    return Division(splits, tuple(names), notes, lambda: (plan()[1],))


def by_name(names: Sequence[str], where: str) -> tuple[dict[str, list[str]] | None, tuple[str, ...]]:
    """Documents by the split that each names, None where they name no train or nothing else; and notes."""
    named: dict[str, list[str]] = {}
    rest = []
    for name in names:
        split = split_name(Path(name))
        named.setdefault(split, []).append(name) if split else rest.append(name)
    others = [name for split in ("valid", "test") for name in named.get(split, ())]
    if "train" not in named or not others:
        unused = others or named.get("train", []) if rest else others
        notes = (
            f"{some(unused)}: split as all others are, for no other file names {'train' if others else 'a split'}",
        )
        return None, notes if unused else ()
    about = [name for name in rest if ABOUT.fullmatch(Path(name).name)]
    if left := [name for name in rest if name not in about]:
        raise ConfigError(
            f"data.source = {where}: {len(left)} of {len(names)} files name no split, where others name "
            f"{' and '.join(named)}: {some(left)}; name each for its split, or move it away"
        )
    return named, (f"left out: {some(about)}",) if about else ()


def by_hash_or_position(
    sizes: Mapping[str, int], read: Callable[[Sequence[str]], Iterator[Piece]], border: Border
) -> tuple[dict[str, Pieces], str]:
    """At least three documents of known sizes: their splits, and a note with the shares that came out."""
    order = in_order(sizes)
    large_first = sorted(order, key=lambda name: sizes[name] * 20 <= sum(sizes.values()))  # what fits no small split
    for tried in (order, large_first):
        parts = split_in_order(tried, sizes)
        held = [sum(sizes[name] for name in parts[split]) for split in SPLITS]
        if all(0.025 <= held[i] / max(sum(held), 1) <= 0.1 for i in (1, 2)):
            splits: dict[str, Pieces] = {split: partial(read, names) for split, names in parts.items()}
            return splits, f"files ordered by a hash of their paths, split {shares(held)}"
    note = f"files ordered by a hash of their paths, split 90/5/5 by position: whole ones would be {shares(held)}"
    return carve(lambda: read(order), SPLITS, border), note


def in_order(sizes: Mapping[str, int]) -> list[str]:
    """Names in the order of their hash."""
    return sorted(sizes, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())


def split_in_order(order: Sequence[str], sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """At least three documents: 90 % of the bytes are train, then valid, test.

    A new or longer file moves at most the files next to the two borders into another split.
    """
    ends = list(accumulate(sizes[name] for name in order))
    valid, test = (bisect_left(ends, ends[-1] * share // 100) for share in (90, 95))
    valid = min(max(valid, 1), len(order) - 2)
    test = min(max(test, valid + 1), len(order) - 1)
    return {"train": list(order[:valid]), "valid": list(order[valid:test]), "test": list(order[test:])}


def shares(sizes: Sequence[int]) -> str:
    """90/5/5, to two digits behind the point."""
    return "/".join(f"{round(100 * size / max(sum(sizes), 1), 2):g}" for size in sizes)
