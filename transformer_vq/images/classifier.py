"""A small classifier of the corpus at hand, whose features measure distances between sets of pictures.

It stands in where the standard Inception weights cannot be had. Its numbers compare runs on one corpus and nothing
else, hence the name `frechet_classifier`, never FID, and its accuracy beside it. It depends on the corpus alone, not on
the run: trained once with a fixed seed, then kept in the user's cache.

What it learns: the labels; without labels, by which of four quarter turns a picture was turned  [Gidaris 1803.07728].

Axes:   B batch  C channels  h, w height and width  F features
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from transformer_vq.config import ConfigError
from transformer_vq.data import default_cache
from transformer_vq.evaluation.mode import evaluating
from transformer_vq.files import write, writing
from transformer_vq.images.batches import positions, to_unit
from transformer_vq.images.pictures import Pictures
from transformer_vq.images.sources import ImageCorpus

FORMAT = 1
FEATURES = 64
BATCH = 128
RATE = 2e-3
TURNS = 4


class Classifier(nn.Module):
    """uint8 pictures to features; `head` from there to classes. Any size of pictures."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.num_features = FEATURES  # read by torchmetrics
        layers: list[nn.Module] = []
        at = channels
        for width, stride in ((16, 2), (32, 1), (64, 2), (64, 1)):
            layers += [nn.Conv2d(at, width, 3, stride=stride, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            at = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * at, FEATURES))
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, C, h, w) uint8 -> features (B, F)."""
        features: Tensor = self.body(to_unit(pictures).to(self.head.weight.dtype))
        return features

    def logits(self, pictures: Tensor) -> Tensor:
        """(B, C, h, w) uint8 -> (B, classes)."""
        logits: Tensor = self.head(F.silu(self(pictures)))
        return logits


class Trained(NamedTuple):
    """A classifier, and how good it is."""

    model: Classifier
    task: str
    """`labels` or `turns`."""
    accuracy: float
    """On the test split."""


def cache_folder(cache: str | None) -> Path:
    """Where classifiers are kept."""
    return Path(cache).expanduser() if cache else default_cache().parent / "image-classifiers"


def check_cache(cache: str | None) -> None:
    """Raises ConfigError where a classifier could not be kept; nothing is made."""
    folder = cache_folder(cache)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"data.cache = {folder}: no classifier can be kept there: {there} is no folder to write to")


def classifier_of(corpus: ImageCorpus, steps: int, cache: str | None, device: torch.device) -> Trained:
    """The corpus's classifier, from the cache or trained now."""
    task = "labels" if corpus.classes is not None else "turns"
    model = Classifier(corpus.shape.channels, corpus.classes or TURNS)
    sizes = [len(split) for split in corpus.splits.values()]
    identity = repr((FORMAT, corpus.sha256, tuple(corpus.shape), sizes, corpus.classes, steps, BATCH, RATE))
    folder = cache_folder(cache)
    path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.safetensors"
    if path.is_file():
        try:
            with safe_open(path, "pt") as file:
                model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                accuracy = float(file.metadata()["accuracy"])
            return Trained(model.to(device).eval(), task, accuracy)
        except (SafetensorError, OSError, RuntimeError, KeyError, TypeError, ValueError):
            model = Classifier(corpus.shape.channels, corpus.classes or TURNS)  # damaged: trained again, as the first
    model, accuracy = _train(model, corpus, task, steps, device)
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    about, need = {"accuracy": repr(accuracy)}, sum(tensor.nbytes for tensor in weights.values())
    write(path, lambda place: save_file(weights, place, about), need)  # whole: another run may be looking for it
    return Trained(model.eval(), task, accuracy)


def _train(
    model: Classifier, corpus: ImageCorpus, task: str, steps: int, device: torch.device
) -> tuple[Classifier, float]:
    """Train with seed 0 and a cosine schedule; accuracy on the test split."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.reset_parameters()
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    train = corpus.splits["train"]
    for step in range(steps):
        pictures, classes = _examples(train, positions(len(train), 0, step, range(BATCH), BATCH), task, device)
        loss = F.cross_entropy(model.logits(pictures), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    test, right = corpus.splits["test"], 0
    with evaluating(model):
        for start in range(0, len(test), BATCH):
            index = np.arange(start, min(start + BATCH, len(test)))
            pictures, classes = _examples(test, index, task, device)
            right += int((model.logits(pictures).argmax(-1) == classes).sum())
    return model, right / len(test)


def _examples(split: Pictures, index: np.ndarray, task: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pictures (B, C, h, w) uint8 and their classes (B,)."""
    pictures = torch.from_numpy(split.read(index))
    if task == "labels":
        assert split.labels is not None
        return pictures.to(device), torch.from_numpy(split.labels[index]).to(device)
    turns = torch.from_numpy(index) % TURNS
    square = pictures.shape[2] == pictures.shape[3]
    turned = [
        torch.rot90(p, int(t) if square else 2 * (int(t) // 2), (1, 2)) for p, t in zip(pictures, turns, strict=True)
    ]
    return torch.stack(turned).to(device), (turns if square else turns // 2).to(device)
