"""TensorBoard, Weights & Biases and trackio, through Accelerate; a resumed run goes on in the same place there.

    trackers/run.json   project and id under which the run is known: {"project": ..., "id": ...}

Beside the numbers of an evaluation they show how its keys are spread over codes (`evaluation/histograms.py`):
histograms of at most LAYERS layers and one picture, at most EVALUATIONS times and at the end.

The names are drawn once, before anything is started, and stay with the folder wherever it is moved. Steps that are
made again after a resume have the same numbers, so a tracker may drop them, or keep the later ones.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from transformer_vq.config.extras import MissingPackage, lack
from transformer_vq.evaluation.histograms import Histogram, KeyHistograms
from transformer_vq.files import read_text, write_text, writing
from transformer_vq.quantizers import Quantizer
from transformer_vq.training.distributed import on_main

LAYERS = 8
EVALUATIONS = 25


def check_trackers(trackers: Sequence[str]) -> None:
    """Raises MissingPackage for one that is not installed, and imports none."""
    for tracker in trackers:
        if find_spec(tracker) is None:
            raise MissingPackage(lack(tracker, f"train.trackers = {tracker}"))


class Trackers:
    """What `train.trackers` names, for one run; none of them: nothing happens."""

    def __init__(self, accelerator: Accelerator, folder: Path, names: Sequence[str], evaluations: int = 0) -> None:
        """evaluations: how many the run plans, of which EVALUATIONS at most are listened to."""
        self.accelerator, self.folder, self.names = accelerator, folder, names
        self.stride = max(1, -(-evaluations // EVALUATIONS))

    def start(self, config: Mapping[str, Any], step: int) -> None:
        """Begin, or go on after `step`."""
        if not self.names:
            return
        known = on_main(self.accelerator, self._identity)
        with writing(self.folder / "trackers"):
            self.accelerator.init_trackers(known["project"], flat(config), arguments(known, self.folder, step))

    def log(self, split: str, record: Mapping[str, Any], step: int) -> None:
        """The numbers of a record, as `split/key`."""
        if self.names:
            numbers = {f"{split}/{key}": value for key, value in record.items() if isinstance(value, int | float)}
            with writing(self.folder / "trackers"):
                self.accelerator.log(numbers, step=step)

    def listening(self, quantizers: Callable[[], Mapping[str, Quantizer]], number: int, final: bool) -> KeyHistograms:
        """A context for the evaluation of that number: listens to some of the quantizers, or, mostly, to none."""
        due = self.names and (final or number % self.stride == 0)
        return KeyHistograms(spaced(quantizers(), LAYERS) if due else {})

    def show(self, split: str, heard: KeyHistograms, step: int) -> None:
        """Histograms as `split/layer0/code_share`, and one picture of them as `split/codes`."""
        found = heard.histograms() if self.accelerator.is_main_process else {}
        if not found:
            return
        from transformer_vq.evaluation.figures import draw_histograms, pixels

        picture = pixels(draw_histograms(found, f"{split}, step {step}"))
        with writing(self.folder / "trackers"):
            for tracker in self.accelerator.trackers:
                if tracker.name in SHOW:
                    SHOW[tracker.name](tracker.tracker, split, found, picture, step)

    def finish(self) -> None:
        """The run has ended, however it did."""
        for tracker in getattr(self.accelerator, "trackers", []):
            tracker.finish()

    def _identity(self) -> dict[str, str]:
        path = self.folder / "trackers" / "run.json"
        if path.is_file():
            known: dict[str, str] = json.loads(read_text(path))
            return known
        fresh = {"project": self.folder.resolve().name, "id": uuid.uuid4().hex[:12]}
        with writing(path):
            path.parent.mkdir(exist_ok=True)
        write_text(path, json.dumps(fresh))
        return fresh


Shown = Mapping[str, Histogram]


def show_tensorboard(writer: Any, split: str, found: Shown, picture: NDArray[np.uint8], step: int) -> None:
    """To a SummaryWriter."""
    for name, (counts, edges) in found.items():
        middle = (edges[1:] + edges[:-1]) / 2
        writer.add_histogram_raw(
            f"{split}/{name}",
            min=edges[0],
            max=edges[-1],
            num=counts.sum(),
            sum=(counts * middle).sum(),
            sum_squares=(counts * middle**2).sum(),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )
    writer.add_image(f"{split}/codes", picture, step, dataformats="HWC")


def show_run(module: str) -> Callable[[Any, str, Shown, NDArray[np.uint8], int], None]:
    """To a run of wandb, or of trackio, which has the same names."""

    def show(run: Any, split: str, found: Shown, picture: NDArray[np.uint8], step: int) -> None:
        kinds = import_module(module)
        values = {f"{split}/{name}": kinds.Histogram(np_histogram=tuple(one)) for name, one in found.items()}
        run.log({**values, f"{split}/codes": kinds.Image(picture)}, step=step)

    return show


SHOW = {"tensorboard": show_tensorboard, "wandb": show_run("wandb"), "trackio": show_run("trackio")}


def spaced(quantizers: Mapping[str, Quantizer], most: int) -> dict[str, Quantizer]:
    """At most so many of them, evenly spaced, the first and the last among them."""
    names = list(quantizers)
    chosen = sorted({round(i) for i in np.linspace(0, len(names) - 1, min(most, len(names)))})
    return {names[i]: quantizers[names[i]] for i in chosen}


def arguments(known: Mapping[str, str], folder: Path, step: int) -> dict[str, dict[str, Any]]:
    """By tracker, what its own start is told beside the project: who the run is, and that it may have begun before."""
    return {
        "wandb": {"dir": str(folder / "trackers"), "id": known["id"], "resume": "allow"},
        "trackio": {"name": f"{known['project']}-{known['id']}", "resume": "allow"},
        "tensorboard": {"purge_step": step + 1} if step else {},  # what was logged after the checkpoint comes again
    }


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A config as one level of dotted keys, as trackers want it."""
    out: dict[str, str] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
    return out
