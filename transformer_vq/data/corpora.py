"""What `data.source` can be: the built-in corpus, a text file, a folder, pictures (see arrays.py), a dataset (see
huggingface.py).

A source is opened without reading its text: it knows its name, a hash of its content and, per split, how to read it.
Every file is a document.
"""

from __future__ import annotations

import difflib
import hashlib
import platform
import sysconfig
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from itertools import accumulate
from pathlib import Path

from transformer_vq.config import ConfigError, DataConfig
from transformer_vq.data.arrays import holds_arrays, open_arrays
from transformer_vq.data.cache import cache_of
from transformer_vq.data.documents import SPLITS, Border, Piece, Pieces, carve, read_file
from transformer_vq.data.enwik8 import fetch
from transformer_vq.data.huggingface import open_dataset
from transformer_vq.data.sources import Source, complete, hash_files, split_name, walk

NOT_TEXT = (
    "*.parquet",
    "*.arrow",
    "*.jsonl",
    "*.jsonl.gz",
    "*.zip",
    "*.tar",
    "*.tar.*",
    "*.npy",
    "*.npz",
    "*.safetensors",
)

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
    files = [path for path in files if path.stat().st_size]
    if len(files) < 100:
        raise ConfigError(f"data.source = builtin: {root} holds no standard library in source; name a text file")
    name = f"source code of Python {platform.python_version()}'s standard library (no tests, no generated tables)"
    return Source(name, hash_files(root, files), read_all(split_by_hash(root, files)))


def open_file(path: Path, border: Border) -> Source:
    """One file, 90/5/5 by position: of the official enwik8, the usual 90, 5 and 5 million bytes."""
    refuse_not_text([path])
    if path.stat().st_size == 0:
        raise ConfigError(f"data.source = {path}: the file is empty")
    splits = carve(lambda: read_file(path), SPLITS, border)
    return Source(str(path), hash_files(path.parent, [path]), splits, ("split 90/5/5 by position",))


def open_folder(root: Path, border: Border) -> Source:
    """A folder, hidden files aside: split by the files' names if these say train and valid or test, else by a hash."""
    files = [path for path in walk(root, frozenset({"__pycache__"})) if not path.name.startswith(".")]
    for path in files:
        if path.name in ("enwik8", "enwik8.xz", "enwik8.gz"):
            return open_file(path, border)
    files = [path for path in files if path.stat().st_size]
    if not files:
        raise ConfigError(f"data.source = {root}: the folder holds no text")
    if len(files) == 1:
        return open_file(files[0], border)

    named: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for path in files:
        if split := split_name(path.relative_to(root)):
            named[split].append(path)
    if named["train"] and (named["valid"] or named["test"]):
        used = [path for split in SPLITS for path in named[split]]
        refuse_not_text(used)
        splits, notes = complete(read_all({split: paths for split, paths in named.items() if paths}), border)
        if len(used) < len(files):
            notes += (f"{len(files) - len(used)} of {len(files)} files left out: their names say no split",)
        return Source(str(root), hash_files(root, used), splits, ("split by the files' names", *notes))
    refuse_not_text(files)
    if len(files) == 2:
        splits = carve(lambda: read_in_turn(files), SPLITS, border)
        return Source(str(root), hash_files(root, files), splits, ("two files, split 90/5/5 by position",))
    splits = read_all(split_by_hash(root, files))
    return Source(str(root), hash_files(root, files), splits, ("files ordered by a hash of their paths, split 90/5/5",))


def split_by_hash(root: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """At least three files in the order of a hash of their path: 90 % of the bytes are train, then valid, test.

    A new or longer file moves at most the files next to the two borders into another split.
    """
    order = sorted(files, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())
    ends = list(accumulate(path.stat().st_size for path in order))
    valid, test = (bisect_left(ends, ends[-1] * share // 100) for share in (90, 95))
    valid = min(max(valid, 1), len(order) - 2)
    test = min(max(test, valid + 1), len(order) - 1)
    return {"train": order[:valid], "valid": order[valid:test], "test": order[test:]}


def read_in_turn(files: Sequence[Path]) -> Iterator[Piece]:
    """Several files, each a document."""
    for path in files:
        yield from read_file(path)


def read_all(splits: dict[str, list[Path]]) -> dict[str, Pieces]:
    """Readers of lists of files."""
    return {split: (lambda files=files: read_in_turn(files)) for split, files in splits.items()}  # type: ignore[misc]


def refuse_not_text(files: Sequence[Path]) -> None:
    """Raise ConfigError for a file that holds rows or an archive: its bytes are no text."""
    for path in files:
        if any(fnmatch(path.name, pattern) for pattern in NOT_TEXT):
            raise ConfigError(f"data.source: {path} is not text; parquet and JSON are read with hf:{path.parent}")
