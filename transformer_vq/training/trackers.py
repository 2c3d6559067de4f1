"""TensorBoard, Weights & Biases and trackio, through Accelerate; a resumed run goes on in the same place there.

    trackers/run.json   project and id under which the run is known: {"project": ..., "id": ...}

The names are drawn once, before anything is started, and stay with the folder wherever it is moved. Steps that are
made again after a resume have the same numbers, so a tracker may drop them, or keep the later ones.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from transformer_vq.config import ConfigError
from transformer_vq.files import read_text, write_text, writing
from transformer_vq.training.distributed import on_main


def check_trackers(trackers: Sequence[str]) -> None:
    """Raises ConfigError for one that is not installed."""
    for tracker in trackers:
        if find_spec(tracker) is None:
            raise ConfigError(f"train.trackers = {tracker}: is not installed; pip install 'transformer-vq[tracking]'")


class Trackers:
    """What `train.trackers` names, for one run; none of them: nothing happens."""

    def __init__(self, accelerator: Accelerator, folder: Path, names: Sequence[str]) -> None:
        self.accelerator, self.folder, self.names = accelerator, folder, names

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
