"""The one training loop, for every task: steps, and what happens between them.

Order: update, training record, checkpoint; evaluation only then, before the next update. So a run resumed from a
checkpoint repeats everything behind it bit for bit, its evaluation included.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from transformer_vq import __version__
from transformer_vq.config import CheckpointConfig, ConfigError
from transformer_vq.config.run import OptimizationConfig
from transformer_vq.training.checkpoints import load_json, load_tensors, save_json, save_tensors, verify
from transformer_vq.training.distributed import compare_replicas, on_main, processes, sum_over_processes
from transformer_vq.training.progress import Progress
from transformer_vq.training.run_folder import RunFolder
from transformer_vq.training.signals import Stop
from transformer_vq.training.step import NotFinite, Stepper
from transformer_vq.training.task import Task

COMPARE_EVERY = 100  # steps between comparisons of parameters and codebooks across processes


class TrainingDiverged(RuntimeError):
    """The loss or a gradient is not finite; the run stopped before that update."""


class TrainingInterrupted(RuntimeError):
    """A signal stopped the run; a checkpoint was written."""


class Evaluated(Protocol):
    """What the loop reads of `eval:`; the rest is the task's."""

    @property
    def every(self) -> int | None: ...


class RunSettings(Protocol):
    """What the loop reads of a run's config, a `Settings` with these blocks and the task's own."""

    @property
    def seed(self) -> int: ...
    @property
    def run_dir(self) -> str: ...
    @property
    def train(self) -> OptimizationConfig: ...
    @property
    def eval(self) -> Evaluated: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """All of it as plain values."""


def train(
    config: RunSettings,
    make_task: Callable[[Accelerator], Task],
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train what `make_task` makes, as `config` says, and return the run's summary.

    A finished run of the same config is not run again: its summary is returned. resume: go on from the last checkpoint,
    or start where there is none. Nothing global is left behind, so runs may follow one another in a process.
    Raises ConfigError for bad input, TrainingDiverged, TrainingInterrupted, CheckpointError for a damaged checkpoint.
    """
    settings = config.train
    _check_trackers(settings.trackers)
    with processes(settings.trackers, Path(config.run_dir)) as accelerator, _kept_random_state(accelerator.device):
        if settings.batch_size < accelerator.num_processes:
            raise ConfigError(
                f"train.batch_size = {settings.batch_size}: must be at least {accelerator.num_processes}, the number "
                "of processes"
            )
        quiet = quiet or not accelerator.is_main_process
        with RunFolder(config.run_dir, config.checkpoint.keep) as folder, Progress(settings.steps, quiet) as progress:
            finished = on_main(accelerator, lambda: folder.check(config, resume, overwrite))
            if finished is not None:
                progress.say(f"{folder.path} holds a finished run of this config; --overwrite to run it again")
                return finished
            task = make_task(accelerator)
            new = overwrite or on_main(accelerator, folder.checkpoints.last) is None
            origin = _warm_start(task, settings.init_from, accelerator) if new and settings.init_from else {}
            step = on_main(accelerator, lambda: folder.begin(config, resume, overwrite))
            on_main(accelerator, lambda: task.begin(folder.path))
            loop = Loop(config, task, accelerator, folder, progress)
            loop.start(step, origin)
            return loop.run()


class Loop:
    """One run. `done` counts optimizer steps, `units` the tokens or images in them, `seconds` the time they took."""

    def __init__(
        self, config: RunSettings, task: Task, accelerator: Accelerator, folder: RunFolder, progress: Progress
    ) -> None:
        self.config, self.train, self.task = config, config.train, task
        self.accelerator, self.folder, self.progress = accelerator, folder, progress
        self.checkpoints = folder.checkpoints
        self.step = Stepper(task, config.train, config.seed, accelerator)
        self.done, self.units, self.seconds = 0, 0, 0.0

    def start(self, step: int, origin: Mapping[str, str]) -> None:
        """Take everything from the checkpoint of `step`, 0: start anew; then say what is about to happen."""
        if step:
            self._load(step)
            origin = {"goes on": f"after step {step}, from {self.checkpoints.path(step)}"}
        self.step.wrap()
        train, count = self.train, self.accelerator.num_processes
        self.progress.announce(
            {
                **self.task.describe(),
                "training": f"{train.steps:,} steps of {train.batch_size}, {train.optimizer}, {train.precision}",
                "device": device_name(self.accelerator.device) + (f", {count} processes" if count > 1 else ""),
                "writes to": str(self.folder.path),
                **origin,
            }
        )

    def run(self) -> dict[str, Any]:
        """Train to the end, evaluate, and return the summary."""
        self._start_trackers()
        self.progress.begin(self.done)
        try:
            with Stop() as stop:
                self._steps(stop)
            return self._finish()
        finally:
            for tracker in getattr(self.accelerator, "trackers", []):
                tracker.finish()

    def _steps(self, stop: Stop) -> None:
        train, speed = self.train, f"{self.task.unit}_per_s"
        logged, pace = (self.units, self.seconds), 0.0
        while self.done < train.steps:
            if self.done and _due(self.done, self.config.eval.every):
                self._evaluate(self.task.splits[0], final=False)
            began = time.perf_counter()
            try:
                record, units = self.step(self.done)
            except NotFinite as error:
                raise TrainingDiverged(
                    f"step {self.done}: {error}; stopped before the update. {self._last()}"
                ) from error
            self.done, self.units = self.done + 1, self.units + units
            self.seconds += time.perf_counter() - began
            stopping = self._any_process(stop.requested)
            if self.done in (1, train.steps) or self.done % train.log_every == 0:
                pace = (self.units - logged[0]) / max(self.seconds - logged[1], 1e-9)
                logged = self.units, self.seconds
                self._record("train", {**record, speed: pace})
            self.progress.update(self.done, {**record, speed: pace}, self.task.unit)
            if self.done == 1 or self.done % COMPARE_EVERY == 0:
                for player in self.task.players.values():
                    compare_replicas(player.module, self.accelerator)
            if stopping or self.done == train.steps or _due(self.done, self.config.checkpoint.every):
                self.save()
            if stopping and self.done < train.steps:
                raise TrainingInterrupted(
                    f"stopped after step {self.done} of {train.steps}; {self.checkpoints.path(self.done)} is written, "
                    "and the same command with --resume goes on from there"
                )

    def save(self) -> None:
        """Write a checkpoint of where the run is, unless there is one already."""
        checkpoints, step, carried = self.checkpoints, self.done, self.task.carried()
        carries = self._any_process(bool(carried))

        def write() -> bool:
            if step == checkpoints.last():
                return False
            self.folder.flush()
            temporary = checkpoints.begin(step)
            for name, optimizers in self.step.optimizers.items():
                save_tensors(self.task.players[name].module.state_dict(), temporary / f"{name}.safetensors")
                save_tensors(optimizers.state(), temporary / f"{name}-optimizer.safetensors")
            count = self.accelerator.num_processes
            values = {"units": self.units, "seconds": self.seconds, "processes": count, "carries": carries}
            save_json(values, temporary / "trainer.json")
            return True

        if on_main(self.accelerator, write):
            if carries:
                save_tensors(
                    carried, checkpoints.temporary(step) / f"carried-{self.accelerator.process_index}.safetensors"
                )
                self.accelerator.wait_for_everyone()
            on_main(self.accelerator, lambda: checkpoints.commit(step))

    def _load(self, step: int) -> None:
        checkpoint, count = self.checkpoints.path(step), self.accelerator.num_processes
        on_main(self.accelerator, lambda: verify(checkpoint))
        values = load_json(checkpoint / "trainer.json")
        if values["carries"] and values["processes"] != count:
            raise ConfigError(
                f"{checkpoint}: holds the state carried by {values['processes']} processes; resume with as many, "
                f"not {count}"
            )
        for name, optimizers in self.step.optimizers.items():
            self.task.players[name].module.load_state_dict(load_tensors(checkpoint / f"{name}.safetensors"))
            optimizers.load(load_tensors(checkpoint / f"{name}-optimizer.safetensors"))
        if values["carries"]:
            self.task.restore(load_tensors(checkpoint / f"carried-{self.accelerator.process_index}.safetensors"))
        self.done, self.units, self.seconds = step, values["units"], values["seconds"]

    def _evaluate(self, split: str, final: bool) -> dict[str, Any]:
        """Evaluate a split and record it; by the first split's primary metric the best checkpoint is kept."""
        values = on_main(self.accelerator, lambda: self.task.evaluate(split, final))
        self._record(split, values)
        primary = self.task.primary
        self.progress.evaluated(self.done, split, values, primary)
        if split == self.task.splits[0] and math.isfinite(values[primary]):
            best = on_main(self.accelerator, self.checkpoints.best)
            if best is None or values[primary] < best[primary]:
                self.save()
                on_main(self.accelerator, lambda: self.checkpoints.mark_best(self.done, primary, values[primary]))
        return values

    def _record(self, split: str, values: Mapping[str, Any]) -> None:
        where = {"step": self.done, self.task.unit: self.units, "split": split}
        record = {**where, **{key: value for key, value in values.items() if key not in where}}
        if self.accelerator.is_main_process:
            self.folder.record(record)
        if self.train.trackers:
            numbers = {f"{split}/{key}": value for key, value in record.items() if isinstance(value, int | float)}
            self.accelerator.log(numbers, step=self.done)

    def _any_process(self, value: bool) -> bool:
        flag = torch.tensor(int(value), device=self.accelerator.device)
        return sum_over_processes(flag, self.accelerator).item() > 0

    def _last(self) -> str:
        last = self.checkpoints.last()
        return (
            "No checkpoint was written yet" if last is None else f"Last good checkpoint: {self.checkpoints.path(last)}"
        )

    def _start_trackers(self) -> None:
        if self.train.trackers:
            place = {"wandb": {"dir": str(self.folder.path)}}
            self.accelerator.init_trackers(self.folder.path.name, _flat(self.config.model_dump(mode="json")), place)

    def _finish(self) -> dict[str, Any]:
        """Final evaluations, the summary, and what else the task writes."""
        numbers = {split: self._evaluate(split, final=True) for split in self.task.splits}
        modules = [player.module for player in self.task.players.values()]
        summary = {
            "run_dir": str(self.folder.path),
            **numbers,
            "best": on_main(self.accelerator, self.checkpoints.best),
            "checkpoint": str(self.checkpoints.path(self.done)),
            "steps": self.done,
            self.task.unit: self.units,
            "seconds": self.seconds,
            f"{self.task.unit}_per_s": self.units / max(self.seconds, 1e-9),
            "parameters": sum(p.numel() for module in modules for p in module.parameters()),
            "device": device_name(self.accelerator.device),
            "processes": self.accelerator.num_processes,
            "versions": {
                "transformer_vq": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }

        def write() -> dict[str, Any] | None:
            self.task.finish(self.folder.path)
            self.folder.finish(summary)
            return self.folder.summary()

        return on_main(self.accelerator, write) or {}


def _warm_start(task: Task, origin: str, accelerator: Accelerator) -> dict[str, str]:
    """Weights of another run for the first player; a line for the first screen."""
    try:
        checkpoint = find_checkpoint(origin)
    except ConfigError as error:
        raise ConfigError(f"train.init_from = {error}") from None
    on_main(accelerator, lambda: verify(checkpoint))
    first = next(iter(task.players))
    notes = task.warm_start(load_tensors(checkpoint / f"{first}.safetensors"), checkpoint.parents[1])
    return {"starts from": f"{checkpoint}; {'; '.join(notes)}"}


def find_checkpoint(origin: str) -> Path:
    """The folder of `RUN[@best|@last|@STEP]`; a RUN alone means its last.  Raises ConfigError naming what there is."""
    run, _, which = (origin, "", "last") if Path(origin).is_dir() or "@" not in origin else origin.rpartition("@")
    if not Path(run).is_dir():
        raise ConfigError(f"{origin}: there is no run folder {run}")
    return RunFolder(run).checkpoints.resolve(which)


def device_name(device: torch.device) -> str:
    """Like `cuda (NVIDIA H100)` or `cpu (2 threads)`."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({torch.get_num_threads()} threads)"


def _due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0


def _check_trackers(trackers: Sequence[str]) -> None:
    for tracker in trackers:
        if find_spec(tracker) is None:
            raise ConfigError(f"train.trackers = {tracker}: is not installed; pip install 'transformer-vq[tracking]'")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A config as one level of dotted keys, as trackers want it."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
    return flat


def _kept_random_state(device: torch.device) -> Any:
    """The steps seed torch's global generators; give them back as they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
