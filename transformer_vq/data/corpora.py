"""What `data.source` can be: the built-in corpus, a text file, a folder, pictures (see arrays.py), a dataset (see
huggingface.py).

A source is opened without reading its text: it knows its name, a hash of its content and, per split, how to read it.
Every file is a document, and so is every member of an archive; formats.py tells what a file holds.
"""

from __future__ import annotations

import difflib
import platform
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from transformer_vq.config import ConfigError, DataConfig
from transformer_vq.config.explain import some
from transformer_vq.data.arrays import holds_arrays, open_arrays
from transformer_vq.data.cache import cache_of
from transformer_vq.data.documents import SPLITS, Border, Piece, Pieces
from transformer_vq.data.enwik8 import fetch
from transformer_vq.data.formats import SUFFIXES, Member, check, members, read_file
from transformer_vq.data.huggingface import open_dataset
from transformer_vq.data.places import carve
from transformer_vq.data.sources import Source, explore, hash_files, walk
from transformer_vq.data.splitting import Collection, divide, in_order, split_in_order

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")
"""Suffixes of rows that are text too: a file of them is read as rows, among other text they are text."""

ENWIK8 = ("enwik8", *(f"enwik8{suffix}" for suffix in (*SUFFIXES, ".zip")))

LEFT_OUT_FOLDERS = {
    "__pycache__": "compiled",
    "site-packages": "not the standard library",
    "dist-packages": "the same, on Debian",
    "test": "tests: as much text as all the rest, and much of it data",
    "tests": "tests",
    "idle_test": "tests of idlelib",
    "encodings": "character tables written by a program, and look-alike wrappers around them",
    "pydoc_data": "the language reference as one generated string",
}
LEFT_OUT_FILES = {
    "_sysconfigdata*.py": "generated when Python was built; holds local paths",
    "sitecustomize.py": "belongs to the machine",
    "usercustomize.py": "belongs to the machine",
    "html/entities.py": "a table of character names",
    "keyword.py": "generated table",
    "re/_casefix.py": "generated table",
    "stringprep.py": "generated table",
    "token.py": "generated table",
}


def open_source(config: DataConfig, border: Border) -> Source:
    """Find what `data.source` names.  Raises ConfigError when it is not there or holds nothing.

    border: where splits that are carved off others may be cut.
    """
    if config.source == "builtin":
        return builtin()
    if config.source == "enwik8" and not Path("enwik8").exists():
        return open_file(fetch(cache_of(config) / "enwik8"), border)
    if config.source.startswith("hf:"):
        return open_dataset(config, border)
    path = Path(config.source).expanduser()
    if holds_arrays(path):
        return open_arrays(path, config)
    if config.image_size is not None and path.exists():
        raise ConfigError(
            f"data.image_size = {config.image_size}: {path} is read as text; pictures are named hf:{path} (picture "
            "files, parquet), or are .npz files"
        )
    if path.is_dir():
        return open_folder(path, border)
    if path.is_file():
        return open_file(path, border)
    near = difflib.get_close_matches(config.source, ["builtin", "enwik8"], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"data.source = {config.source}: no such file or folder "
        f"(builtin | enwik8 | a file | a folder | .npz | hf:NAME[/CONFIG][@REVISION]){hint}"
    )


def builtin() -> Source:
    """The Python standard library's own source: real text on every machine.

    Left out: tests and generated tables, see LEFT_OUT_*.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in walk(root, frozenset(LEFT_OUT_FOLDERS)):
        relative = path.relative_to(root).as_posix()
        if path.suffix == ".py" and not any(fnmatch(relative, pattern) for pattern in LEFT_OUT_FILES):
            files.append(path)
    sizes = {path.relative_to(root).as_posix(): size for path in files if (size := path.stat().st_size)}
    if len(sizes) < 100:
        raise ConfigError(f"data.source = builtin: {root} holds no standard library in source; name a text file")
    name = f"source code of Python {platform.python_version()}'s standard library (no tests, no generated tables)"
    parts = split_in_order(in_order(sizes), sizes)
    splits: dict[str, Pieces] = {split: partial(read_in_turn, root, names) for split, names in parts.items()}
    return Source(name, hash_files(root, [root / name for name in sizes]), splits)


def open_file(path: Path, border: Border) -> Source:
    """One file, 90/5/5 by position: the usual 90, 5 and 5 million bytes of enwik8. An archive is read as a folder."""
    if path.stat().st_size == 0:
        raise ConfigError(f"data.source = {path}: the file is empty")
    if (table := path.with_suffix("") if path.suffix in SUFFIXES else path).suffix.lower() in TABLES:
        raise ConfigError(
            f"data.source: {path} holds rows ({table.suffix}), no text; rows are read with hf:{path}, data.field names "
            "the column"
        )
    found = members(path)
    for member in found:
        check(path, member)
    fingerprint = hash_files(path.parent, [path])
    if len(found) == 1:
        splits = carve(lambda: read_file(path), SPLITS, border)
        return Source(str(path), fingerprint, splits, ("split 90/5/5 by position", *converted({path.name: found})))
    if not found:
        raise ConfigError(f"data.source = {path}: the archive holds no text")
    documents = Collection(
        str(path),
        {member.name: None if member.format.name else member.size for member in found},
        lambda names: read_file(path, frozenset(names)),
    )
    parts = divide(documents, border)
    notes = (*parts.notes, *converted({path.name: found}))
    return Source(str(path), fingerprint, parts.splits, notes, parts.measured)


def open_folder(root: Path, border: Border) -> Source:
    """A folder, hidden files aside; an archive in it is one document after another. See splitting.py for its splits."""
    under = explore(root, frozenset({"__pycache__"}))
    files = [path for path in under.files if not path.name.startswith(".")]
    for path in files:
        if path.name in ENWIK8:
            return open_file(path, border)
    files = [path for path in files if path.stat().st_size]
    if not files:
        raise ConfigError(f"data.source = {root}: the folder holds no text")
    if len(files) == 1:
        return open_file(files[0], border)
    found = {path.relative_to(root).as_posix(): members(path) for path in files}
    sizes = {
        name: sum(member.size or 0 for member in inside)
        if all(member.size is not None and not member.format.name for member in inside)
        else None
        for name, inside in found.items()
    }
    parts = divide(Collection(str(root), sizes, partial(read_in_turn, root)), border)
    for name in parts.used:
        for member in found[name]:
            check(root / name, member)
    tables = [name for name in parts.used if Path(name).suffix.lower() in TABLES]
    if len(tables) == len(parts.used):
        raise ConfigError(f"data.source = {root}: its files hold rows, no text; rows are read with hf:{root}")
    notes = (*parts.notes, *converted({name: found[name] for name in parts.used}), *under.notes)
    if tables:
        notes += (f"rows as text, as they are written: {some(tables)}",)
    fingerprint = hash_files(root, [root / name for name in parts.used])
    return Source(str(root), fingerprint, parts.splits, notes, parts.measured)


def converted(found: Mapping[str, Sequence[Member]]) -> tuple[str, ...]:
    """Notes that name the documents whose bytes are not read as they stand."""
    by_encoding: dict[str, list[str]] = {}
    for name, inside in found.items():
        for member in inside:
            if member.format.role == "text" and member.format.name:
                full = f"{name}/{member.name}" if member.name else name
                by_encoding.setdefault(member.format.name, []).append(full)
    words = {"utf-8-sig": "a byte-order mark is left out of the text of"}
    return tuple(
        f"{words.get(encoding, f'converted from {encoding.upper()} to UTF-8:')} {some(names)}"
        for encoding, names in by_encoding.items()
    )


def read_in_turn(root: Path, names: Sequence[str]) -> Iterator[Piece]:
    """Several files, each a document."""
    for name in names:
        yield from read_file(root / name)
