"""Whether the runs of a study fit in memory: the largest of them, told before any begins.

Runs that look large are counted, those that cannot be larger than what was found are not. Of image runs the network of
a perceptual loss is left out: whether it can be had, the run itself finds out. Nothing is downloaded: runs that need it
are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformer_vq.config import ConfigError, RunConfig, TransformerVQConfig
from transformer_vq.config.images import ImageDataConfig, ImageRunConfig
from transformer_vq.config.recall import RecallRunConfig
from transformer_vq.config.toy import ToyRunConfig
from transformer_vq.data.tokenizers import is_here
from transformer_vq.images import memory as of_images
from transformer_vq.images.pictures import Shape
from transformer_vq.images.sources import HUB, open_corpus
from transformer_vq.studies.folder import RESULTS
from transformer_vq.studies.outcomes import state_of, unique
from transformer_vq.studies.plan import Run, Study
from transformer_vq.studies.run import expected_runs
from transformer_vq.studies.toy import ToyAutoencoder
from transformer_vq.training.memory import needed_where_close, roughly, training_memory, warning
from transformer_vq.training.whole_step import whole_step

COUNTED = 8
"""Configurations that are counted at most, those that look largest first: each takes seconds."""
ADVICE = "a smaller train.micro_batch takes less, with the same result, and so do fewer --jobs"


@dataclass(frozen=True)
class Need:
    """Bytes of a step of a run on one process."""

    run: Run
    rough: int
    """More than it takes, most likely; at no cost."""
    exactly: Callable[[], int]


def complaint(study: Study, device: str, at_once: int, vocabulary: Callable[[str], int]) -> str | None:
    """One line where the largest unfinished run takes more than there is; None where all fit or nobody can tell.

    at_once: runs that share a machine, or GPUs in turn. vocabulary: number of tokens that a tokenizer has.
    """
    left = [run for run in unique(expected_runs(study)) if state_of(run) not in RESULTS]
    gpus = torch.cuda.device_count() if device == "cuda" else 1
    together = -(-min(at_once, len(left)) // gpus)
    most, largest = 0, None
    for need in sorted(_needs(left, device, vocabulary), key=lambda need: need.rough, reverse=True)[:COUNTED]:
        if need.rough <= most:
            break
        found = needed_where_close(need.rough * together, need.exactly, device, 1)
        if found > most:
            most, largest = found, need.run
    if largest is None:
        return None
    beside = f", {together} of them at once" if together > 1 else ""
    what = f"a step of {' '.join(largest.arm.split())}, the largest{beside},"
    return warning(what, most * together, device, ADVICE)


def _needs(runs: list[Run], device: str, vocabulary: Callable[[str], int]) -> list[Need]:
    """Of each configuration once, whatever its seed; without those that nobody can tell of."""
    shapes: dict[str, Shape | None] = {}
    needs: dict[str, Need] = {}
    for run in runs:
        key = json.dumps(run.settings.model_dump(mode="json", exclude={"seed", "run_dir"}), sort_keys=True)
        if key not in needs and (need := _need(run, device, vocabulary, shapes)) is not None:
            needs[key] = need
    return list(needs.values())


def _need(run: Run, device: str, vocabulary: Callable[[str], int], shapes: dict[str, Shape | None]) -> Need | None:
    settings: Any = run.settings
    if isinstance(settings, ImageRunConfig):
        key = settings.data.model_dump_json()
        if key not in shapes:
            shapes[key] = picture_shape(settings.data)
        if (shape := shapes[key]) is None:
            return None
        rough = of_images.roughly(settings, shape)
        return Need(run, rough, lambda: of_images.step_memory(settings, shape, device).total)
    if isinstance(settings, ToyRunConfig):
        return Need(run, toy_roughly(settings), lambda: toy_memory(settings, device))
    if settings.data is not None and not is_here(settings.data.tokenizer):
        return None
    try:
        text = as_text(settings, vocabulary)
    except ConfigError:  # the run itself will tell
        return None
    probes = isinstance(settings, RunConfig)
    return Need(run, roughly(text, 1), lambda: training_memory(text, device, probes=probes).total)


def as_text(settings: RunConfig | RecallRunConfig, vocabulary: Callable[[str], int]) -> RunConfig:
    """A run of a language model, with or without questions, whose vocabulary is set."""
    model: TransformerVQConfig = getattr(settings, "settled_model", settings.model)
    data = settings.data
    if model.vocab_size is None and data is not None:
        model = model.model_copy(update={"vocab_size": vocabulary(data.tokenizer)})
    if isinstance(settings, RunConfig):
        return settings.model_copy(update={"model": model})
    whole = RunConfig().data if data is None else data
    whole = whole.model_copy(update={"order": "windows"})  # a recall run carries no state
    return RunConfig().model_copy(update={"data": whole, "model": model, "train": settings.train})


def picture_shape(data: ImageDataConfig) -> Shape | None:
    """Of a study's pictures, without downloading any; None where that would be needed."""
    if data.size is not None:
        return Shape(data.channels or 3, data.size, data.size)
    if data.source in HUB or data.source.startswith("hf:"):
        return None
    try:
        return open_corpus(data).shape
    except ConfigError:  # the run itself will tell
        return None


def toy_memory(settings: ToyRunConfig, device: str) -> int:
    """Of a step, with all points."""
    toy = settings.toy
    over = {"start_step": 0, "init": "normal"}
    present = {name: value for name, value in over.items() if hasattr(toy.quantizer, name)}
    with torch.device("meta"):
        started = toy.model_copy(update={"quantizer": toy.quantizer.model_copy(update=present)})
        model = ToyAutoencoder(started, settings.seed)

    def loss(_: str, rows: int) -> Tensor:
        error, own, _ = model(torch.empty(rows, toy.dim, dtype=next(model.parameters()).dtype))
        total: Tensor = error + own
        return total

    return whole_step({"model": model}, loss, settings.train, device).total + points(settings)


def points(settings: ToyRunConfig) -> int:
    """Bytes of all points."""
    toy = settings.toy
    return 4 * toy.dim * (toy.train_points + 2 * toy.test_points)


def toy_roughly(settings: ToyRunConfig) -> int:
    """More than that, most likely; at no cost."""
    toy, rows = settings.toy, settings.train.micro_batch or settings.train.batch_size
    codes = getattr(toy.quantizer, "size", 0)
    weights = 2 * (toy.dim + toy.hidden + toy.key_dim) * toy.hidden + codes * toy.key_dim
    return points(settings) + 64 * (rows * (toy.dim + 4 * toy.hidden + toy.key_dim) + weights) + 2**27
