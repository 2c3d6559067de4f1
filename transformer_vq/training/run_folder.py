"""The folder of a run: who may write there, and what lies where.

config.yaml      the resolved config, written first
metrics.jsonl    one JSON object a record
checkpoints/     see checkpoints.py
plots/           pictures
trackers/        what TensorBoard and the like write
summary.json     the final numbers; a run that has it is finished
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import yaml

from transformer_vq.config import ConfigError, save_config
from transformer_vq.config.load import difference
from transformer_vq.training.checkpoints import Checkpoints, flush, write_text

KEPT = "reference-rest.msgpack"  # what a converted model had beside its parameters; see convert/
OURS = ("summary.json", "checkpoints", "metrics.jsonl", "plots", "trackers", "tokenizer.json", KEPT, "config.yaml")


class RunFolder:
    """One run's folder, held by one process at a time while the `with` block runs."""

    def __init__(self, path: str | Path, keep: int = 1) -> None:
        self.path = Path(path)
        self.checkpoints = Checkpoints(self.path / "checkpoints", keep)
        self._lock: IO[str] | None = None
        self._metrics: IO[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._metrics, self._lock):
            if file is not None:
                file.close()

    def check(self, config: Any, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """Whether a run with this config may be written here; writes nothing.

        Returns the summary of a finished run of the same config, which is not to be run again, else None.
        Raises ConfigError when the folder holds another run, or an unfinished one and neither flag is given.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run_dir = {self.path}: is a file; a folder is needed")
        if overwrite and resume:
            raise ConfigError("--resume goes on with a run and --overwrite deletes it: give one of them")
        if overwrite or not (self.path / "config.yaml").is_file():
            if not overwrite and self.checkpoints.steps():
                raise ConfigError(
                    f"run_dir = {self.path}: holds checkpoints without a config.yaml; --overwrite deletes them"
                )
            return None
        changed = difference(_without_place(self.read_config()), _without_place(config.model_dump(mode="json")))
        if changed:
            raise ConfigError(
                f"run_dir = {self.path}: holds a run with another config ({'; '.join(changed)}); choose another "
                "run_dir, or --overwrite to delete that run"
            )
        summary = self.summary()
        if summary is None and not resume:
            steps = self.checkpoints.steps()
            at = f"an unfinished run, with a checkpoint of step {steps[-1]}" if steps else "an unfinished run"
            raise ConfigError(f"run_dir = {self.path}: holds {at}; --resume to go on, --overwrite to delete it")
        return summary

    def begin(self, config: Any, resume: bool, overwrite: bool) -> int:
        """Take hold of the folder, make it ready, and return the step to go on from (0: a new run).

        Raises ConfigError as `check` does, and when another process is writing here.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a")
        except OSError as error:
            raise ConfigError(f"run_dir = {self.path}: cannot be written to: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"run_dir = {self.path}: another process is writing there") from None
        self.check(config, resume, overwrite)
        if overwrite:
            for name in OURS:
                path = self.path / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        save_config(config, self.path / "config.yaml")
        flush(self.path / "config.yaml")
        step = self.checkpoints.last() or 0
        self._forget_after(step)
        return step

    def read_config(self) -> dict[str, Any]:
        """The config as it was written.  Raises ConfigError when it is damaged."""
        try:
            tree = yaml.safe_load((self.path / "config.yaml").read_text())
        except yaml.YAMLError:
            tree = None
        if not isinstance(tree, dict):
            raise ConfigError(f"{self.path / 'config.yaml'}: damaged; --overwrite to delete this run")
        return tree

    def summary(self) -> dict[str, Any] | None:
        """The final numbers of a finished run."""
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the final numbers, which make this a finished run."""
        write_text(self.path / "summary.json", json.dumps(plain(summary), indent=1))

    def record(self, values: Mapping[str, Any]) -> None:
        """Append one record to `metrics.jsonl`."""
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("a")
        self._metrics.write(json.dumps(plain(values)) + "\n")
        self._metrics.flush()

    def flush(self) -> None:
        """Wait until all records are on disk."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())

    def _forget_after(self, step: int) -> None:
        """Drop the records that a run resumed at `step` will write again, and a last line that a kill cut short.

        An evaluation comes after the checkpoint of its step, so that one is written again too.
        """
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record["step"] < step or (record["step"] == step and record["split"] == "train"):
                kept.append(line + "\n")
        write_text(path, "".join(kept))


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON knows them: NaN and infinity become null."""
    return {
        key: plain(value)
        if isinstance(value, Mapping)
        else None
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for key, value in values.items()
    }


def _without_place(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the folder it is written to: a run may be moved."""
    return {key: value for key, value in config.items() if key != "run_dir"}
