"""The folder of a run: who may write there, and what lies where.

config.yaml      the resolved config, written first
metrics.jsonl    one JSON object a record
checkpoints/     see checkpoints.py
plots/           pictures
pieces/          what each document, window or example of a split was scored; see evaluation/pieces.py
trackers/        what TensorBoard and the like write
summary.json     the final numbers; a run that has it is finished
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import yaml

from transformer_vq.config import ConfigError, Settings, save_config, validate
from transformer_vq.config.load import difference
from transformer_vq.files import WriteError, lock, read_text, write_text, writing
from transformer_vq.training.checkpoints import TRAINER, Checkpoints

KEPT = "reference-rest.msgpack"  # what a converted model had beside its parameters; see convert/
OURS = (
    "summary.json",
    "checkpoints",
    "metrics.jsonl",
    "plots",
    "pieces",
    "trackers",
    "tokenizer.json",
    KEPT,
    "config.yaml",
)


class RunFolder:
    """One run's folder, held by one process at a time while the `with` block runs."""

    def __init__(self, path: str | Path, keep: int = 1) -> None:
        self.path = Path(path)
        self.checkpoints = Checkpoints(self.path / "checkpoints", keep)
        self._held = ExitStack()
        self._metrics: IO[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._held, suppress(OSError):  # what a full disk did not take has been complained about
            if self._metrics is not None:
                self._metrics.close()

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
        old, summary, last = self.read_config(type(config)), self.summary(), self.checkpoints.last()
        if last and not (self.checkpoints.path(last) / TRAINER).is_file():  # at step 0 there is none to miss
            raise ConfigError(
                f"run_dir = {self.path}: holds a model that was imported, without an optimizer's state to go on with; "
                f"train.init_from={self.path} starts another run from its weights"
            )
        self._same_run(old, config, resume)
        if summary is not None and "early_stop" in summary and config.train.steps > old.train.steps:
            raise ConfigError(
                f"train.steps = {config.train.steps}: the run in {self.path} stopped early, after step "
                f"{summary['steps']}, by train.patience = {old.train.patience}; more steps would change nothing"
            )
        if summary is not None and ("early_stop" in summary or summary.get("steps", 0) >= config.train.steps):
            return summary
        if not resume:
            at = f"an unfinished run, with a checkpoint of step {last}" if last else "an unfinished run"
            raise ConfigError(f"run_dir = {self.path}: holds {at}; --resume to go on, --overwrite to delete it")
        return None

    def _same_run(self, old: Any, new: Any, resume: bool) -> None:
        """Raises ConfigError unless `new` describes the run that `old` does, or on `resume` a longer one."""
        before, steps = old.train.steps, new.train.steps
        changed = difference(_compared(old), _compared(new))
        if steps <= before:  # how a run is trained on is asked when it is
            changed += difference({"train.extend": old.train.extend}, {"train.extend": new.train.extend})
        if not changed and steps < before:
            last = self.checkpoints.last()
            stands = f"has made {last} of {before}" if last else f"is planned for {before}"
            raise ConfigError(
                f"train.steps = {steps}: the run in {self.path} {stands} steps; --resume takes as many or more, "
                "--overwrite deletes it"
            )
        if not changed and (steps == before or resume):
            return
        hint = f"--resume to train that run on to {steps} steps, " if not changed else ""
        changed += difference({"train.steps": before}, {"train.steps": steps})
        raise ConfigError(
            f"run_dir = {self.path}: holds a run with another config ({'; '.join(changed)}); {hint}choose another "
            "run_dir, or --overwrite to delete that run"
        )

    def begin(self, config: Any, resume: bool, overwrite: bool) -> tuple[int, int, list[str]]:
        """Take hold of the folder: the step to go on from (0: a new run), the steps planned until now, and what is to
        be said of later checkpoints, which are damaged.

        Raises ConfigError as `check` does, and when another process is writing here; CheckpointError when there are
        checkpoints and all are damaged.
        """
        try:
            self._held.enter_context(lock(self.path / ".lock"))
        except BlockingIOError:
            raise ConfigError(f"run_dir = {self.path}: another process is writing there") from None
        except WriteError:
            raise
        except OSError as error:
            raise ConfigError(f"run_dir = {self.path}: cannot be written to: {error.strerror}") from None
        self.check(config, resume, overwrite)
        if overwrite:
            for name in OURS:
                path = self.path / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        known = (self.path / "config.yaml").is_file()
        planned = self.read_config(type(config)).train.steps if known else config.train.steps
        if not known:
            save_config(config, self.path / "config.yaml")
        step, damaged = self.checkpoints.last_whole()
        return step, planned, damaged

    def go_on(self, config: Any, step: int) -> None:
        """From here on the run is the one that `config` describes, and stands at `step`.

        One renamed file decides that. A kill before leaves the run as it was; after it, `--resume` goes on. The numbers
        and pictures of a finished run that is trained on stay until the longer one has its own.
        """
        save_config(config, self.path / "config.yaml")
        self._forget_after(step)

    def read_config(self, schema: type[Settings]) -> Any:
        """The config as it was written, newer keys at their defaults.  Raises ConfigError when it is damaged."""
        try:
            tree = yaml.safe_load(read_text(self.path / "config.yaml"))
        except yaml.YAMLError:
            tree = None
        if not isinstance(tree, dict):
            raise ConfigError(f"{self.path / 'config.yaml'}: damaged; --overwrite to delete this run")
        try:
            return validate(tree, schema).written()
        except ConfigError as error:
            raise ConfigError(f"{self.path / 'config.yaml'}: {error}; --overwrite to delete this run") from None

    def summary(self) -> dict[str, Any] | None:
        """The final numbers of a finished run."""
        path = self.path / "summary.json"
        return json.loads(read_text(path)) if path.is_file() else None

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the final numbers, which make this a finished run."""
        write_text(self.path / "summary.json", json.dumps(plain(summary), indent=1))

    def record(self, values: Mapping[str, Any]) -> None:
        """Append one record to `metrics.jsonl`."""
        path = self.path / "metrics.jsonl"
        with writing(path):
            if self._metrics is None:
                self._metrics = path.open("a", encoding="utf-8")
            self._metrics.write(json.dumps(plain(values)) + "\n")
            self._metrics.flush()

    def numbers(self, split: str, metric: str) -> list[tuple[int, float | None]]:
        """(step, value) of a metric in the records of a split, as far as they are written."""
        path = self.path / "metrics.jsonl"
        records = [record for _, record in _records(path)] if path.is_file() else []
        return [(record["step"], record.get(metric)) for record in records if record["split"] == split]

    def sums(self, split: str, prefix: str) -> dict[str, float]:
        """The sum of every number so named over the records of a split, as far as they are written."""
        path, found = self.path / "metrics.jsonl", dict[str, float]()
        for _, record in _records(path) if path.is_file() else ():
            for name, value in record.items() if record["split"] == split else ():
                if name.startswith(prefix) and value is not None:
                    found[name] = found.get(name, 0.0) + value
        return found

    def flush(self) -> None:
        """Wait until all records are on disk."""
        if self._metrics is not None:
            with writing(self.path / "metrics.jsonl"):
                os.fsync(self._metrics.fileno())

    def _forget_after(self, step: int) -> None:
        """Drop the records that a run resumed at `step` will write again, and a last line that a kill cut short.

        An evaluation comes after the checkpoint of its step, so that one is written again too, unless a finished run
        is trained on: its last evaluations stay.
        """
        finished = (self.summary() or {}).get("steps") == step
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return
        kept = []
        for line, record in _records(path):
            if record["step"] < step or (record["step"] == step and (finished or record["split"] == "train")):
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


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The whole lines of `metrics.jsonl`, as they stand and as what they say."""
    for line in read_text(path).splitlines():
        with suppress(ValueError):
            yield line, json.loads(line)


def _compared(config: Settings) -> dict[str, Any]:
    """What makes it another run: not its folder, a run may be moved; nor how long it trains or waits, or how it is cut
    up.
    """
    return config.model_dump(
        mode="json", exclude={"run_dir": True, "train": {"steps", "extend", "shard", "context_parallel", "timeout"}}
    )
