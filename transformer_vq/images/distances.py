"""Distances that look through a network: FID, Inception score and LPIPS where their weights can be had, else our own.

Axes:   B batch  C channels  h, w height and width
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from transformer_vq.config import ConfigError
from transformer_vq.config.images import ImageEvalConfig
from transformer_vq.images.batches import to_unit
from transformer_vq.images.classifier import classifier_of
from transformer_vq.images.sources import ImageCorpus

UNOBTAINABLE = (ImportError, OSError, RuntimeError)  # no package, no network, a download that isn't what it should be


ALONE: dict[str, Any] = {"sync_on_compute": False}  # the main process evaluates while the others wait for it


class Unobtainable(Exception):
    """A network's weights are not at hand: one line that says why."""


class Distance(Protocol):
    """Sees all pictures of a split and their reconstructions."""

    def update(self, pictures: Tensor, decoded: Tensor) -> None:
        """uint8 (B, C, h, w), both."""

    def compute(self) -> dict[str, Any]:
        """Names and numbers."""


class Inception:
    """FID and the Inception score of the reconstructions, standard weights.  Raises Unobtainable."""

    def __init__(self, device: torch.device) -> None:
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
            from torchmetrics.image.inception import InceptionScore

            self.fid = FrechetInceptionDistance(feature=2048, **ALONE).set_dtype(torch.float64).to(device)
            self.score = InceptionScore(**ALONE).to(device)
        except UNOBTAINABLE as error:
            raise Unobtainable(_reason("FID and Inception score", error)) from None

    def update(self, pictures: Tensor, decoded: Tensor) -> None:
        """uint8 (B, C, h, w), both."""
        self.fid.update(_colour(pictures), real=True)
        self.fid.update(_colour(decoded), real=False)
        self.score.update(_colour(decoded))

    def compute(self) -> dict[str, Any]:
        """fid, inception_score."""
        return {"fid": self.fid.compute().item(), "inception_score": self.score.compute()[0].item()}


class ClassifierDistance:
    """Fréchet distance on the features of the corpus's own classifier."""

    def __init__(self, corpus: ImageCorpus, steps: int, cache: str | None, device: torch.device) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.trained = classifier_of(corpus, steps, cache, device)
        feature: nn.Module = self.trained.model.double()
        size = (corpus.shape.channels, corpus.shape.height, corpus.shape.width)
        self.frechet = FrechetInceptionDistance(feature=feature, input_img_size=size, **ALONE).to(device)
        self.frechet.set_dtype(torch.float64)

    def update(self, pictures: Tensor, decoded: Tensor) -> None:
        """uint8 (B, C, h, w), both."""
        self.frechet.update(pictures, real=True)
        self.frechet.update(decoded, real=False)

    def compute(self) -> dict[str, Any]:
        """frechet_classifier, and what the classifier is worth."""
        return {
            "frechet_classifier": self.frechet.compute().item(),
            "classifier_accuracy": self.trained.accuracy,
            "classifier_task": self.trained.task,
        }


class Lpips(nn.Module):
    """LPIPS with VGG, as a metric and as a loss.  Raises Unobtainable."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self.network = LearnedPerceptualImagePatchSimilarity(net_type="vgg").net.eval().requires_grad_(False)
        except UNOBTAINABLE as error:
            raise Unobtainable(_reason("LPIPS", error)) from None
        self.total, self.count = 0.0, 0

    def forward(self, pictures: Tensor, decoded: Tensor) -> Tensor:
        """Mean distance, pictures from -1 to 1; gradient to `decoded`."""
        return self.network(_colour(decoded), _colour(pictures)).mean()

    def update(self, pictures: Tensor, decoded: Tensor) -> None:
        """uint8 (B, C, h, w), both."""
        self.total += len(pictures) * self(to_unit(pictures), to_unit(decoded)).item()
        self.count += len(pictures)

    def compute(self) -> dict[str, Any]:
        """lpips."""
        return {"lpips": self.total / max(self.count, 1)}


def distances(
    settings: ImageEvalConfig, corpus: ImageCorpus, cache: str | None, device: torch.device
) -> tuple[list[Distance], list[str]]:
    """What `eval:` asks for, and lines about what could not be had.  Raises ConfigError for what was asked by name."""
    chosen: list[Distance] = []
    notes = []
    if settings.frechet in ("inception", "auto"):
        try:
            chosen.append(Inception(device))
        except Unobtainable as reason:
            if settings.frechet == "inception":
                raise ConfigError(f"eval.frechet = inception: {reason}") from None
            notes.append(f"{reason}; frechet_classifier stands in for it")
    if settings.frechet == "classifier" or (settings.frechet == "auto" and not chosen):
        chosen.append(ClassifierDistance(corpus, settings.classifier_steps, cache, device))
    if settings.lpips:
        try:
            chosen.append(Lpips().to(device))
        except Unobtainable as reason:
            raise ConfigError(f"eval.lpips = true: {reason}") from None
    return chosen, notes


def _colour(pictures: Tensor) -> Tensor:
    """(B, 3, h, w): grey is repeated."""
    return pictures.expand(-1, 3, -1, -1)


def _reason(what: str, error: BaseException) -> str:
    return f"{what} cannot be had here ({' '.join(str(error).split())[:160]}); pip install 'transformer-vq[images-fid]'"
