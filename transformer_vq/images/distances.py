"""Distances that look through a network: FID, Inception score and LPIPS where their weights can be had, else our own.

Axes:   B batch  C channels  h, w height and width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from transformer_vq.config import ConfigError
from transformer_vq.config.extras import wanted
from transformer_vq.config.images import ImageEvalConfig
from transformer_vq.images.batches import to_unit
from transformer_vq.images.classifier import FEATURES, check_cache, classifier_of
from transformer_vq.images.sources import ImageCorpus

FRECHET_PICTURES = 2  # a covariance needs as many
LPIPS_SIDE = 16  # pixels; VGG halves them four times
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
        distance: Tensor = self.network(_colour(decoded), _colour(pictures)).mean()
        return distance

    def update(self, pictures: Tensor, decoded: Tensor) -> None:
        """uint8 (B, C, h, w), both."""
        self.total += len(pictures) * self(to_unit(pictures), to_unit(decoded)).item()
        self.count += len(pictures)

    def compute(self) -> dict[str, Any]:
        """lpips."""
        return {"lpips": self.total / max(self.count, 1)}


@dataclass(frozen=True)
class Plan:
    """Which distances are measured once the run is trained, found out before it is."""

    makers: list[Callable[[torch.device], Distance]]
    notes: list[str]
    """What is left out or stands in for something else, and why."""

    def make(self, device: torch.device) -> list[Distance]:
        """Anew; the classifier is trained now, unless it is kept."""
        return [maker(device) for maker in self.makers]


def plan(settings: ImageEvalConfig, corpus: ImageCorpus, cache: str | None) -> Plan:
    """What `eval:` asks for and these pictures allow. Too few or too small pictures leave a distance out.

    Raises ConfigError for what was asked by name and whose weights cannot be had, or a cache that cannot be written.
    """
    makers: list[Callable[[torch.device], Distance]] = []
    count, shape, notes = len(corpus.splits["test"]), corpus.shape, []
    kind = settings.frechet
    if kind != "none" and count < FRECHET_PICTURES:
        notes.append(f"no Fréchet distance: it needs {FRECHET_PICTURES} pictures of the test split, there is {count}")
        kind = "none"
    if kind in ("inception", "auto"):
        try:
            Inception(torch.device("cpu"))
            makers.append(Inception)
        except Unobtainable as reason:
            if kind == "inception":
                raise ConfigError(f"eval.frechet = inception: {reason}") from None
            notes.append(f"{reason}; frechet_classifier stands in for it")
            kind = "classifier"
    if kind == "classifier" and corpus.classes is None and max(shape.height, shape.width) == 1:
        notes.append("no frechet_classifier: without labels it learns by turning pictures, and these are single pixels")
    elif kind == "classifier":
        check_cache(cache)
        makers.append(lambda device: ClassifierDistance(corpus, settings.classifier_steps, cache, device))
        if count <= FEATURES:
            notes.append(
                f"frechet_classifier is of {count} test pictures and {FEATURES} features: it compares runs on these"
            )
    if settings.lpips and min(shape.height, shape.width) < LPIPS_SIDE:
        notes.append(f"no lpips: it needs {LPIPS_SIDE} pixels a side, these are {shape}")
    elif settings.lpips:
        try:
            Lpips()
        except Unobtainable as reason:
            raise ConfigError(f"eval.lpips = true: {reason}") from None
        makers.append(lambda device: Lpips().to(device))
    return Plan(makers, notes)


def _colour(pictures: Tensor) -> Tensor:
    """(B, 3, h, w): grey is repeated."""
    return pictures.expand(-1, 3, -1, -1)


def _reason(what: str, error: BaseException) -> str:
    return f"{what} cannot be had here ({' '.join(str(error).split())[:160]}); pip install {wanted('torchvision')}"
