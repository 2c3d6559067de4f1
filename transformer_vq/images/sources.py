"""Where pictures come from: a corpus of three splits behind one function, `open_corpus`.

Splits. Three that are named train, valid and test are taken as they are. Of train and one other, the other is the test
split and a twentieth of train, 5,000 at most, is held out as valid. All in one: 90/5/5. What is held out is drawn with
a fixed seed, or by a hash of the file's path in a folder, so that it does not depend on the run.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from transformer_vq.config import ConfigError
from transformer_vq.config.images import ImageDataConfig
from transformer_vq.images.pictures import (
    IN_MEMORY,
    Alike,
    InMemory,
    OnDemand,
    Pictures,
    Prepare,
    Selected,
    Shape,
    from_array,
    header,
    open_picture,
    picture_files,
    to_image,
)

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
HUB = {  # columns are found by their type
    "cifar10": "uoft-cs/cifar10",
    "imagenet": "ILSVRC/imagenet-1k",
    "celeba-hq": "mattymchen/celeba-hq",
    "ffhq": "merkol/ffhq-256",
}
SPLIT_NAMES = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "test": "test"}
IDX = {"train": "train", "t10k": "test", "test": "test"}
HELD_OUT = 20  # one picture of so many
MOST_HELD_OUT = 5000


@dataclass(frozen=True)
class ImageCorpus:
    """Train, valid and test pictures of one shape, and what is to be said about them."""

    name: str
    splits: dict[str, Pictures]
    shape: Shape
    classes: int | None
    """How many labels there are; None when the pictures have none."""
    sha256: str
    """Of the files' contents; of paths and sizes where pictures are read on demand."""
    notice: str | None = None
    """What the user should hear about the source, such as that another one had to do."""

    def describe(self) -> str:
        """One line for the first screen."""
        counts = ", ".join(f"{len(split):,} {name}" for name, split in self.splits.items())
        return f"{self.name}: {self.shape}, {counts}, sha256 {self.sha256[:12]}"


@dataclass(frozen=True)
class Found:
    """Splits as a source has them."""

    name: str
    splits: dict[str, Pictures]
    shape: Shape
    sha256: str
    notice: str | None = None
    divide: Callable[[int], NDArray[np.int64]] | None = None
    """Number of pictures -> a key per picture by which a single split is divided; None: a fixed draw."""


def open_corpus(config: ImageDataConfig) -> ImageCorpus:
    """The pictures that `data:` names.  Raises ConfigError with one line for what is wrong with them."""
    found = _find(config)
    splits = _divide(found)
    for name, split in splits.items():
        if not len(split):
            raise ConfigError(f"data.source = {config.source}: no picture is left for the {name} split; give more")
        limits = [config.max_images, None if name == "train" else config.max_eval_images]
        kept = min([len(split), *(limit for limit in limits if limit is not None)])
        if kept < len(split):
            splits[name] = Selected(split, _draw(len(split), kept))
    labels = [split.labels for split in splits.values()]
    labelled = [x for x in labels if x is not None and x.min() >= 0]
    classes = 1 + max(int(x.max()) for x in labelled) if len(labelled) == len(labels) else None
    return ImageCorpus(found.name, splits, found.shape, classes, found.sha256, found.notice)


def _find(config: ImageDataConfig) -> Found:
    source = config.source
    if source == "builtin":
        if _idx_files(FASHION_MNIST):
            return _from_idx("Fashion-MNIST", FASHION_MNIST, config)
        notice = (
            f"Fashion-MNIST is not at {FASHION_MNIST} (Debian: apt-get install dataset-fashion-mnist); "
            "these are scikit-learn's 8x8 digits instead, too few and too small to judge anything by"
        )
        return _digits(config, notice)
    if source == "digits":
        return _digits(config)
    if source == "fashion-mnist":
        if not _idx_files(FASHION_MNIST):
            raise ConfigError(
                f"data.source = {source}: not at {FASHION_MNIST}; apt-get install dataset-fashion-mnist on Debian, "
                "or hf:zalando-datasets/fashion_mnist"
            )
        return _from_idx("Fashion-MNIST", FASHION_MNIST, config)
    if source in HUB:
        return _from_hub(HUB[source], config)
    if source.startswith("hf:"):
        return _from_hub(source.removeprefix("hf:"), config)
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_idx(path.name, path, config) if _idx_files(path) else _from_folder(path, config)
    if path.is_file() and path.suffix == ".npz":
        return _from_npz(path, config)
    raise ConfigError(
        f"data.source = {source}: no such folder or .npz file "
        f"(builtin | fashion-mnist | digits | a folder | a .npz file | {', '.join(HUB)} | hf:NAME[/CONFIG])"
    )


# --- arrays -----------------------------------------------------------------------------------------------------------


def _digits(config: ImageDataConfig, notice: str | None = None) -> Found:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            f"data.source = {config.source}: needs scikit-learn: pip install 'transformer-vq[images]'"
        ) from None
    raw = load_digits()
    array = np.round(raw.images * (255 / 16)).astype(np.uint8)  # 17 grey levels
    splits = {"train": (array, raw.target.astype(np.int64))}
    return _from_arrays("scikit-learn digits", splits, hashlib.sha256(array.tobytes()).hexdigest(), config, notice)


def _from_npz(path: Path, config: ImageDataConfig) -> Found:
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"data.source = {path}: not readable as .npz: {error}") from None
    splits = {}
    for key, array in content.items():
        if key in SPLIT_NAMES:
            labels = content.get(f"{key}_labels")
            if labels is not None and labels.shape != array.shape[:1]:
                raise ConfigError(f"data.source = {path}: {key}_labels {labels.shape} do not fit {key} {array.shape}")
            splits[SPLIT_NAMES[key]] = (array, None if labels is None else labels.astype(np.int64))
    if not splits:
        raise ConfigError(
            f"data.source = {path}: holds {', '.join(content) or 'nothing'}; arrays named train, valid, test are read"
        )
    return _from_arrays(path.stem, splits, _hash_files(path.parent, [path]), config)


def _idx_files(folder: Path) -> dict[str, Path]:
    """Image files by split, named like train-images-idx3-ubyte.gz."""
    return {
        IDX[name]: path
        for path in sorted(folder.glob("*-images[-.]idx3-ubyte*"))
        if (name := path.name.partition("-images")[0]) in IDX
    }


def _from_idx(name: str, folder: Path, config: ImageDataConfig) -> Found:
    splits: dict[str, tuple[NDArray[Any], NDArray[np.int64] | None]] = {}
    used = []
    for split, path in _idx_files(folder).items():
        beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
        labels = read_idx(beside).astype(np.int64) if beside.is_file() else None
        splits[split] = (read_idx(path), labels)
        used += [path, beside] if labels is not None else [path]
    return _from_arrays(name, splits, _hash_files(folder, used), config)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An idx file of unsigned bytes, gzipped or not.  Raises ConfigError where it is not one, or cut short."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError) as error:
        raise ConfigError(f"data.source: {path} is not readable: {error}") from None
    dimensions = raw[3] if len(raw) > 3 else 0
    shape = tuple(np.frombuffer(raw[4 : 4 + 4 * dimensions], ">u4").tolist())
    body = raw[4 + 4 * dimensions :]
    if raw[:3] != b"\0\0\x08" or len(shape) != dimensions or len(body) != int(np.prod(shape)):
        raise ConfigError(f"data.source: {path} is not a whole idx file of unsigned bytes")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _from_arrays(
    name: str,
    splits: Mapping[str, tuple[NDArray[Any], NDArray[np.int64] | None]],
    sha256: str,
    config: ImageDataConfig,
    notice: str | None = None,
) -> Found:
    alike = Alike(config.source, config.size, config.channels)
    arrays = {split: from_array(array, split, config.source) for split, (array, _) in splits.items()}
    for split, array in arrays.items():
        alike.show(split, "L" if array.shape[1] == 1 else "RGB", (array.shape[3], array.shape[2]))
    shape = alike.shape()
    prepare = Prepare(shape.channels, config.size)
    out: dict[str, Pictures] = {}
    for split, array in arrays.items():
        fits = array.shape[1:] == tuple(shape)
        out[split] = InMemory(array if fits else np.stack([prepare(to_image(a)) for a in array]), splits[split][1])
    return Found(name, out, shape, sha256, notice)


# --- files and datasets -----------------------------------------------------------------------------------------------


def _from_folder(folder: Path, config: ImageDataConfig) -> Found:
    """Pictures below a folder. First-level folders named train, valid or test are splits; a folder around every picture
    (below its split) is its label.
    """
    files = picture_files(folder)
    alike = Alike(str(folder), config.size, config.channels)
    for path in files:
        mode, size = header(path)
        alike.show(path.relative_to(folder).as_posix(), mode, size)
    shape = alike.shape()
    by_split: dict[str, list[Path]] = {}
    tops = {path.relative_to(folder).parts[0] for path in files if len(path.relative_to(folder).parts) > 1}
    split_folders = bool(tops) and tops <= set(SPLIT_NAMES) and "train" in tops
    for path in files:
        parts = path.relative_to(folder).parts
        if split_folders and len(parts) == 1:
            raise ConfigError(f"data.source = {folder}: {path.name} lies beside the splits {', '.join(sorted(tops))}")
        by_split.setdefault(SPLIT_NAMES[parts[0]] if split_folders else "train", []).append(path)
    top = 1 if split_folders else 0
    labels = _folder_labels({s: [p.relative_to(folder).parts[top:-1] for p in paths] for s, paths in by_split.items()})
    prepare = Prepare(shape.channels, config.size)
    splits = {s: _load([_opener(p) for p in paths], prepare, shape, labels[s]) for s, paths in by_split.items()}
    whole = all(isinstance(split, InMemory) for split in splits.values())
    sha256 = _hash_files(folder, files) if whole else _hash_sizes(folder, files)
    keys = np.array(
        [int(hashlib.sha256(p.relative_to(folder).as_posix().encode()).hexdigest()[:8], 16) for p in files], np.int64
    )
    return Found(str(folder), splits, shape, sha256, divide=lambda n: keys)


def _folder_labels(folders: Mapping[str, list[tuple[str, ...]]]) -> dict[str, NDArray[np.int64] | None]:
    """Numbers of the folders around the pictures, None where some picture has no folder or all have the same."""
    every = [names for split in folders.values() for names in split]
    number = {name: i for i, name in enumerate(sorted({"/".join(names) for names in every}))}
    if len(number) < 2 or not all(every):
        return dict.fromkeys(folders)
    return {split: np.array([number["/".join(names)] for names in rows], np.int64) for split, rows in folders.items()}


def _opener(path: Path) -> Callable[[], Image.Image]:
    return lambda: open_picture(path)


def _load(
    openers: list[Callable[[], Image.Image]], prepare: Prepare, shape: Shape, labels: NDArray[np.int64] | None
) -> Pictures:
    """Read now where they fit, so that an unreadable one is heard of now; else when they are needed."""
    pictures = OnDemand(openers, prepare, labels)
    if len(openers) * shape.bytes > IN_MEMORY:
        return pictures
    return InMemory(pictures.read(np.arange(len(openers))), labels)


def _from_hub(name: str, config: ImageDataConfig) -> Found:
    import datasets
    from datasets.exceptions import DatasetsError

    path, subset = _hub_name(name)
    try:
        loaded = datasets.load_dataset(path, subset)
    except (DatasetsError, OSError, ValueError) as error:  # offline, unknown, gated, no such subset
        reason = " ".join(str(error).split())
        raise ConfigError(f"data.source = {config.source}: dataset {name} cannot be had: {reason}") from None
    alike = Alike(config.source, config.size, config.channels)
    raw: dict[str, tuple[Any, str, str | None]] = {}
    for split, rows in loaded.items():
        if str(split) not in SPLIT_NAMES:
            continue
        image = next((c for c, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
        label = next((c for c, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)), None)
        if image is None:
            raise ConfigError(f"data.source = {config.source}: no column of pictures among {', '.join(rows.features)}")
        raw[SPLIT_NAMES[str(split)]] = (rows, image, label)
        for i in range(len(rows)) if config.size is None or config.channels is None else range(1):
            picture = rows[i][image]
            alike.show(f"{split}[{i}]", picture.mode, picture.size)
    shape = alike.shape()
    prepare = Prepare(shape.channels, config.size)
    splits = {}
    for split, (rows, image, label) in raw.items():
        labels = None if label is None else np.array(rows[label], np.int64)
        splits[split] = _load([_row_opener(rows, image, i) for i in range(len(rows))], prepare, shape, labels)
    fingerprints = "".join(rows._fingerprint for rows, _, _ in raw.values())
    return Found(name, splits, shape, hashlib.sha256(fingerprints.encode()).hexdigest())


def _hub_name(name: str) -> tuple[str, str | None]:
    """NAME or NAME/CONFIG, where NAME is a local folder, OWNER/DATASET or DATASET."""
    if Path(name).expanduser().exists():
        return str(Path(name).expanduser()), None
    parts = name.split("/")
    return ("/".join(parts[:2]), parts[2]) if len(parts) == 3 else (name, None)


def _row_opener(rows: Any, column: str, i: int) -> Callable[[], Image.Image]:
    return lambda: rows[i][column]


# --- splits and hashes ------------------------------------------------------------------------------------------------


def _divide(found: Found) -> dict[str, Pictures]:
    given = found.splits
    if set(given) == {"train", "valid", "test"}:
        return {name: given[name] for name in ("train", "valid", "test")}
    train = given.get("train") or next(iter(given.values()))
    other = next((split for split in given.values() if split is not train), None)
    n = len(train)
    keys = (found.divide or _uniform)(n) if other is None else _uniform(n)
    order = np.argsort(keys, kind="stable")
    held = min(max(1, n // HELD_OUT), MOST_HELD_OUT)
    if other is None:
        test, valid, rest = np.split(order, [held, 2 * held])
        return {
            "train": Selected(train, np.sort(rest)),
            "valid": Selected(train, np.sort(valid)),
            "test": Selected(train, np.sort(test)),
        }
    valid, rest = np.split(order, [held])
    return {"train": Selected(train, np.sort(rest)), "valid": Selected(train, np.sort(valid)), "test": other}


def _uniform(n: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(2**32, size=n)


def _draw(n: int, count: int) -> NDArray[np.int64]:
    return np.sort(np.random.default_rng(0).permutation(n)[:count])


def _hash_files(root: Path, files: list[Path]) -> str:
    """sha256 of one file's content; of several, over relative path and content of each."""
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(files) == 1:
        return digests[0]
    lines = (f"{p.relative_to(root).as_posix()}\0{d}\n" for p, d in zip(files, digests, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _hash_sizes(root: Path, files: list[Path]) -> str:
    lines = (f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\n" for path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
