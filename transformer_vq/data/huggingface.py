"""Datasets, read through `datasets`: a name on the Hugging Face hub, or local parquet, JSON (lines), Arrow, CSV or
pictures.

A row is a document; its text, or its picture (see pixels.py), is in the column `data.field`; rows without text (null
or empty) have no tokens. Nothing is downloaded before the text is read, so a corpus that is tokenized already needs no
data. See rows.py for how they are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transformer_vq.config import ConfigError, DataConfig
from transformer_vq.config.explain import one_line, some
from transformer_vq.data.documents import Border, Pieces
from transformer_vq.data.formats import members
from transformer_vq.data.places import Part
from transformer_vq.data.rows import Rows
from transformer_vq.data.sources import SPLIT_WORDS, Source, complete, hash_files, split_name, walk
from transformer_vq.data.splitting import ABOUT, by_name

if TYPE_CHECKING:
    from datasets import DatasetBuilder

READER_OF = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".arrow": "arrow", ".csv": "csv"}
READER_OF |= {".ndjson": "json"}
READER_OF_ROWS = {"parquet": "parquet", "JSON lines": "json", "Arrow": "arrow"}
READS_WHOLE_ROWS = ("parquet", "json", "arrow", "csv", "imagefolder", "webdataset", "pandas")
"""The library's readers that give a row as it was written; `text` and its like lose the line breaks."""
LIBRARY_NAME = {"valid": "validation"}
CONVERTED = "refs/convert/parquet"


def open_dataset(config: DataConfig, border: Border) -> Source:
    """Find the dataset behind `hf:NAME[/CONFIG][@REVISION]` or `hf:PATH`.  Raises ConfigError for one out of reach."""
    name = config.source.removeprefix("hf:")
    path = Path(name).expanduser()
    local = path.exists() or name.startswith(("/", ".", "~"))
    builder = local_builder(path) if local else hub_builder(name)
    found = {str(split): [str(file) for file in files] for split, files in (builder.config.data_files or {}).items()}
    named, said = which_splits(list(found) or list(builder.info.splits or {}))
    if "train" not in named:
        raise ConfigError(f"data.source = {config.source}: no split train; the dataset has {', '.join(found)}")
    if config.shuffle is not None:
        shuffle_files(builder)
    splits: dict[str, Pieces] = {split: Rows(builder, theirs, config) for split, theirs in named.items()}
    column: list[Any] = [config.field]
    column += [config.image_size, "whole pictures"] if border == "document" else []
    column += ["shuffled", config.shuffle] if config.shuffle is not None else []
    if local:
        root = path if path.is_dir() else path.parent
        content = {split: hash_files(root, [Path(file) for file in files]) for split, files in found.items()}
        identity = json.dumps([content, named, *column])
    else:
        identity = json.dumps([found, named, builder.config.name, *column])  # addresses hold the revision
    whole, notes = with_all_splits(splits, config.max_bytes, border)
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    return Source(f"dataset {name}, column {config.field}", fingerprint, whole, (*said, *notes))


def which_splits(found: Sequence[str]) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """A dataset's splits by the one of ours that each names: of several, that with the plain name, else all; notes."""
    named: dict[str, list[str]] = {}
    for theirs in found:
        if split := split_name(Path(theirs)):
            named.setdefault(split, []).append(theirs)
    notes = []
    for split, several in named.items():
        plain = [theirs for theirs in several if SPLIT_WORDS.get(theirs.lower()) == split]
        if len(several) > 1 and len(plain) == 1:
            named[split] = plain
        elif len(several) > 1:
            notes.append(f"{split} is {' and '.join(several)} of the dataset")
    used = {theirs for several in named.values() for theirs in several}
    if left := [theirs for theirs in found if theirs not in used]:
        notes.append(f"splits of the dataset that are left out: {some(left)}")
    return named, tuple(notes)


def with_all_splits(
    splits: dict[str, Pieces], max_bytes: int | None, border: Border
) -> tuple[dict[str, Pieces], tuple[str, ...]]:
    """Carve missing splits off train: off its first `max_bytes`, if set, so that a stream is not read whole."""
    if max_bytes is not None and len(splits) < 3:
        splits = {**splits, "train": Part(splits["train"], lambda: (0, max_bytes), border)}
    whole, notes = complete(splits, border)
    return whole, tuple(f"{note} (of its first {max_bytes:,} bytes)" if max_bytes else note for note in notes)


def local_builder(path: Path) -> DatasetBuilder:
    """A folder of rows or pictures, its files sorted into splits by name as those of text are, or one file."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    if not path.exists():
        raise ConfigError(f"data.source = hf:{path}: no such file or folder")
    if path.is_file() and reader_of(path) is None:
        raise ConfigError(f"data.source = hf:{path}: not one of {', '.join(READER_OF)}; a text file needs no hf:")
    try:
        if path.is_file():
            return load_dataset_builder(reader_of(path), data_files=str(path.resolve()))
        if (path / "README.md").exists() and "configs:" in (path / "README.md").read_text("utf-8", "replace"):
            builder = load_dataset_builder(str(path.resolve()))  # which says itself where its splits are
        else:
            reader, files = sorted_files(path)
            builder = load_dataset_builder(reader, data_files=files)
    except ConfigError:
        raise
    except (OSError, ValueError, DatasetsError) as error:
        raise ConfigError(f"data.source = hf:{path}: no dataset there: {one_line(error)}") from None
    if builder.name not in READS_WHOLE_ROWS:
        raise no_rows(path, builder.name)
    return builder


def sorted_files(root: Path) -> tuple[str, dict[str, list[str]]]:
    """The reader for a folder, and its files by split.  Raises ConfigError where it holds more than one kind."""
    files = [path for path in walk(root, frozenset({"__pycache__"})) if not path.name.startswith(".")]
    by_reader: dict[str, list[Path]] = {}
    for path in files:
        reader = reader_of(path)
        if reader or not ABOUT.fullmatch(path.name):
            by_reader.setdefault(reader or "text", []).append(path)
    pictures = by_reader.pop("imagefolder", [])
    if pictures:  # beside them, tables of what is on them
        by_reader = {"imagefolder": pictures + [path for path in files if path.stem == "metadata"]} | {
            reader: rest
            for reader, paths in by_reader.items()
            if (rest := [path for path in paths if path.stem != "metadata"])
        }
    if not by_reader:
        raise ConfigError(f"data.source = hf:{root}: no dataset there: the folder is empty")
    if "text" in by_reader and len(by_reader) == 1:
        raise no_rows(root, "text")
    if len(by_reader) > 1:
        kinds = "; ".join(
            f"{reader}: {some([path.relative_to(root).as_posix() for path in paths], 3)}"
            for reader, paths in by_reader.items()
        )
        raise ConfigError(f"data.source = hf:{root}: files of more than one kind: {kinds}; keep one")
    reader, kept = by_reader.popitem()
    named, _ = by_name([path.relative_to(root).as_posix() for path in kept], f"hf:{root}")
    if named is None:
        names = {split_name(path.relative_to(root)) for path in kept}
        only = names.pop() if len(names) == 1 else None
        named = {only or "train": [path.relative_to(root).as_posix() for path in kept]}
    return reader, {
        LIBRARY_NAME.get(split, split): [str(root / name) for name in names] for split, names in named.items()
    }


def reader_of(path: Path) -> str | None:
    """The library's reader for a file of rows or a picture, by its name, else by its content."""
    from datasets.packaged_modules import _EXTENSION_TO_MODULE as THEIRS

    if reader := next((READER_OF[suffix] for suffix in path.suffixes if suffix in READER_OF), None):
        return reader
    if THEIRS.get(path.suffix, ("",))[0] == "imagefolder":
        return "imagefolder"
    found = members(path)[0] if path.stat().st_size else None
    return READER_OF_ROWS[found.format.name] if found and found.format.role == "rows" else None


def no_rows(path: Path, reader: str) -> ConfigError:
    """The library would cut text into lines, or join them."""
    return ConfigError(
        f"data.source = hf:{path}: not one of {', '.join(READER_OF)} or pictures but {reader}; a folder of text files "
        "needs no hf:"
    )


def hub_builder(name: str) -> DatasetBuilder:
    """The dataset NAME of the hub; else, when the last part is no part of a name, that part as its configuration.

    With @REVISION, that branch, tag or commit. In the branch of parquet that the hub makes of a dataset with a loading
    script, refs/convert/parquet, a configuration is a folder.
    """
    from datasets import config as library
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    named, _, revision = name.partition("@")
    base, _, last = named.rpartition("/")
    tries = [(base, last)] if named.count("/") == 2 else [(named, None), (base, last)] if base else [(named, None)]
    key = "data_dir" if revision == CONVERTED else "name"
    for path, part in tries:
        try:
            builder = load_dataset_builder(path, revision=revision or None, **{key: part})
            if builder.name == "text":  # would cut at line breaks, and lose them
                whole = {"sample_by": "document", "keep_linebreaks": True}
                builder = load_dataset_builder(path, revision=revision or None, **{key: part}, **whole)
            return builder
        except DatasetNotFoundError:
            continue
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            why = one_line(error)
            break
    else:
        why = "no such dataset, nor a local file or folder"
    raise ConfigError(
        f"data.source = hf:{name}: tried {library.HF_ENDPOINT}/datasets/{named}: {why}; with the data at hand: "
        "data.source=hf:FOLDER (parquet, JSON, pictures), or the path of a text file, of a folder of them, or of .npz"
    )


def shuffle_files(builder: DatasetBuilder) -> None:
    """Put the files of each split into a random order, always the same."""
    for files in (builder.config.data_files or {}).values():
        files[:] = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
