"""Where pictures come from: a corpus of three splits behind one function, `open_corpus`.

Arrays (arrays.py), a folder of pictures (folder.py), a dataset (dataset.py). Splits that are named by whole words are
taken as they are; what is missing is held out of train with a fixed seed, or by a hash of the file's path in a folder,
so that it does not depend on the run (found.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transformer_vq.config import ConfigError
from transformer_vq.config.images import ImageDataConfig
from transformer_vq.data.arrays import holds_arrays
from transformer_vq.images.pictures import Pictures, Selected, Shape
from transformer_vq.images.sources.arrays import digits, from_idx, from_npz, idx_files
from transformer_vq.images.sources.dataset import from_dataset
from transformer_vq.images.sources.folder import from_folder
from transformer_vq.images.sources.found import Found, divide, draw

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
HUB = {  # columns are found by their type
    "cifar10": "uoft-cs/cifar10",
    "imagenet": "ILSVRC/imagenet-1k",
    "celeba-hq": "mattymchen/celeba-hq",
    "ffhq": "merkol/ffhq-256",
}


@dataclass(frozen=True)
class ImageCorpus:
    """Train, valid and test pictures of one shape, and what is to be said about them."""

    name: str
    splits: dict[str, Pictures]
    shape: Shape
    classes: int | None
    """How many labels there are; None when the pictures have none, or all the same."""
    sha256: str
    """Of the files' contents; of paths and sizes where pictures are read on demand."""
    notes: tuple[str, ...] = ()
    """What the user should hear about the source: that another one had to do, what was left out or held out."""

    def describe(self) -> str:
        """One line for the first screen."""
        counts = ", ".join(f"{len(split):,} {name}" for name, split in self.splits.items())
        return f"{self.name}: {self.shape}, {counts}, sha256 {self.sha256[:12]}"


def open_corpus(config: ImageDataConfig) -> ImageCorpus:
    """The pictures that `data:` names.  Raises ConfigError with one line for what is wrong with them."""
    found = _find(config)
    splits, held_out = divide(found)
    for name, split in splits.items():
        if not len(split):
            raise ConfigError(f"data.source = {config.source}: no picture is left for the {name} split; give more")
        limits = [config.max_images, None if name == "train" else config.max_eval_images]
        kept = min([len(split), *(limit for limit in limits if limit is not None)])
        if kept < len(split):
            splits[name] = Selected(split, draw(len(split), kept))
    classes, notes = _classes(splits)
    return ImageCorpus(found.name, splits, found.shape, classes, found.sha256, (*found.notes, *held_out, *notes))


def _classes(splits: dict[str, Pictures]) -> tuple[int | None, tuple[str, ...]]:
    """How many labels there are, and why there are none where some were given."""
    labels = {name: split.labels for name, split in splits.items()}
    given = {name: x for name, x in labels.items() if x is not None and x.min() >= 0}  # datasets: -1 is not known
    if not given:
        return None, ()
    if len(given) < len(labels):
        without = " and ".join(name for name in labels if name not in given)
        return None, (f"labels are not used: {without} has none, or not of every picture",)
    if len(np.unique(np.concatenate(list(given.values())))) < 2:
        return None, ("labels are not used: all are the same",)
    return 1 + max(int(x.max()) for x in given.values()), ()


def _find(config: ImageDataConfig) -> Found:
    source = config.source
    if source == "builtin":
        if idx_files(FASHION_MNIST):
            return from_idx("Fashion-MNIST", FASHION_MNIST, config)
        notice = (
            f"Fashion-MNIST is not at {FASHION_MNIST} (Debian: apt-get install dataset-fashion-mnist); "
            "these are scikit-learn's 8x8 digits instead, too few and too small to judge anything by"
        )
        return digits(config, notice)
    if source == "digits":
        return digits(config)
    if source == "fashion-mnist":
        if not idx_files(FASHION_MNIST):
            raise ConfigError(
                f"data.source = {source}: not at {FASHION_MNIST}; apt-get install dataset-fashion-mnist on Debian, "
                "or hf:zalando-datasets/fashion_mnist"
            )
        return from_idx("Fashion-MNIST", FASHION_MNIST, config)
    if source in HUB:
        return from_dataset(HUB[source], config)
    if source.startswith("hf:"):
        return from_dataset(source.removeprefix("hf:"), config)
    path = Path(source).expanduser()
    if path.is_dir():
        if idx_files(path):
            return from_idx(path.name, path, config)
        return from_npz(path, config) if holds_arrays(path) else from_folder(path, config)
    if path.is_file() and path.suffix == ".npz":
        return from_npz(path, config)
    raise ConfigError(
        f"data.source = {source}: no such folder or .npz file "
        f"(builtin | fashion-mnist | digits | a folder | a .npz file | {', '.join(HUB)} | hf:NAME[/CONFIG])"
    )
