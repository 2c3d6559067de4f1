"""The one training loop, for every task: steps, and what happens between them.

Order: update, training record, checkpoint; evaluation only then, before the next update. So a run resumed from a
checkpoint repeats everything behind it bit for bit, its evaluation included.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from transformer_vq.clock import spent
from transformer_vq.config import CheckpointConfig, ConfigError
from transformer_vq.config.run import OptimizationConfig
from transformer_vq.files import WriteError
from transformer_vq.ops.pages import keep_pages
from transformer_vq.training.agreement import before_joining, check_agreement, code
from transformer_vq.training.average import Averages
from transformer_vq.training.costs import PREFIX, Costs
from transformer_vq.training.distributed import (
    any_process,
    compare_replicas,
    crew,
    everyones,
    on_main,
    processes,
    together,
)
from transformer_vq.training.early_stop import Patience, check_patience
from transformer_vq.training.origin import warm_start
from transformer_vq.training.progress import Progress
from transformer_vq.training.run_folder import RunFolder
from transformer_vq.training.sharding import check_sharding, let_go, views_may_leave_layers
from transformer_vq.training.signals import Signals
from transformer_vq.training.snapshot import Position, read_imported, read_snapshot, write_snapshot
from transformer_vq.training.step import NotFinite, StepAbandoned, Stepper
from transformer_vq.training.summary import device_name, made_on, sizes
from transformer_vq.training.task import EvaluationStopped, Task
from transformer_vq.training.trackers import Trackers, check_trackers
from transformer_vq.training.watch import Watch

COMPILING = "in the first step, which takes a minute or more; evaluations stay as they are"
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


def check_settings(config: RunSettings) -> None:
    """Raises ConfigError for what only the loop can know, before any work."""
    check_trackers(config.train.trackers)
    check_patience(config.train.patience, config.eval.every)


def train(
    config: RunSettings,
    make_task: Callable[[Accelerator], Task],
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train what `make_task` makes, as `config` says, and return the run's summary.

    A finished run of the same config is not run again: its summary is returned. resume: go on from the last checkpoint,
    or start where there is none; `train.steps` may have grown. Nothing global is left behind but freed memory on a CPU
    (ops/pages.py), so runs may follow one another in a process.
    Raises ConfigError for bad input, TrainingDiverged, TrainingInterrupted, CheckpointError for a damaged checkpoint,
    WriteError for a full disk.
    """
    settings, signals = config.train, Signals()
    with before_joining():
        check_settings(config)
    with (
        signals.heard(),
        processes(settings.trackers, Path(config.run_dir), settings.timeout) as accelerator,
        _kept_random_state(accelerator.device),
    ):
        if accelerator.device.type == "cpu":
            keep_pages()
        context = context_of(config)
        flags = {"--resume": resume, "--overwrite": overwrite}
        if accelerator.num_processes > 1:
            check_agreement(accelerator, {**config.model_dump(mode="json"), **flags, "code": code()})
        rows_over = accelerator.num_processes // context
        if settings.batch_size < rows_over:
            shared = f" over train.context_parallel = {context}" if context > 1 else ""
            raise ConfigError(
                f"train.batch_size = {settings.batch_size}: must be at least {rows_over}, the number of "
                f"processes{shared}"
            )
        check_sharding(settings, shard_of(config), accelerator.num_processes, context)
        quiet = quiet or not accelerator.is_main_process
        with RunFolder(config.run_dir, config.checkpoint.keep) as folder, Progress(settings.steps, quiet) as progress:
            finished = on_main(accelerator, lambda: folder.check(config, resume, overwrite))
            if finished is not None:
                early = finished.get("early_stop")
                why = f", stopped early at step {early['step']}" if early else ""
                progress.say(f"{folder.path} holds a finished run of this config{why}; --overwrite to run it again")
                return finished
            made: list[Task] = []
            together(accelerator, lambda: made.append(make_task(accelerator)))
            task = made[0]
            check_agreement(accelerator, {"data": task.fingerprint()})
            new = overwrite or on_main(accelerator, folder.checkpoints.last) is None
            if not new:
                on_main(accelerator, lambda: task.check_resumes(folder.path))
            origin = warm_start(task, settings.init_from, accelerator) if new and settings.init_from else {}
            step, planned, damaged = on_main(accelerator, lambda: folder.begin(config, resume, overwrite), long=True)
            for complaint in damaged:
                progress.say(complaint)
            loop = Loop(config, task, accelerator, folder, progress, signals)
            loop.start(step, planned, origin)
            return loop.run()


class Loop:
    """One run, from where it stands to its end."""

    def __init__(
        self,
        config: RunSettings,
        task: Task,
        accelerator: Accelerator,
        folder: RunFolder,
        progress: Progress,
        signals: Signals,
    ) -> None:
        self.config, self.train, self.task = config, config.train, task
        self.accelerator, self.folder, self.progress, self.signals = accelerator, folder, progress, signals
        self.checkpoints = folder.checkpoints
        shard, context = shard_of(config), context_of(config)
        self.step = Stepper(task, config.train, config.seed, accelerator, shard, lambda: signals.hurry, context)
        self.at = Position()
        modules = {name: player.module for name, player in task.players.items()}
        self.averages = Averages(modules, config.train.steps, getattr(config.train, "average", None))
        self.patience = Patience(config.train.patience)
        evaluations = config.train.steps // config.eval.every if config.eval.every else 0
        self.trackers = Trackers(accelerator, folder.path, config.train.trackers, evaluations)
        unseen = not self.step.gradients_timed or (context > 1 and accelerator.device.type == "cuda")
        reader = self.step.reader
        self.costs = Costs(task.unit, task.flops_per_unit, config.train, accelerator, reader, unseen)
        self.watch = Watch(
            self.costs.clock,
            lambda: self.at.done,
            accelerator.process_index,
            accelerator.num_processes,
            config.train.timeout,
            f" The same command with --resume goes on from the last checkpoint in {folder.path}",
        )
        task.stop_asked = self._evaluation_stop_asked
        task.crew = crew(accelerator, self.step.sharded)

    def _evaluation_stop_asked(self) -> bool:
        """Asked between two batches of an evaluation."""
        self.costs.clock.beat()
        return self.signals.stop

    def start(self, step: int, planned: int, origin: Mapping[str, str]) -> None:
        """Take everything from the checkpoint of `step`, 0: start anew; then say what is about to happen.

        planned: `train.steps` of the run until now. Only when the checkpoint is read does the folder change.
        """
        train, count = self.train, self.accelerator.num_processes
        if step:
            checkpoint = self.checkpoints.path(step)
            optimizers, averages = self.step.optimizers, self.averages.by_name
            self.at = read_snapshot(
                checkpoint, step, self.task, optimizers, train, planned, self.accelerator, self.step.layout, averages
            )
            anew = f"; the schedule began anew after {self.at.restarts[-1]}" if self.at.restarts else ""
            origin = {"goes on": f"after step {step}, from {checkpoint}{anew}"}
        elif on_main(self.accelerator, self.checkpoints.last) == 0:
            read_imported(self.checkpoints.path(0), self.task)
            origin = {"starts from": str(self.checkpoints.path(0))}
        self.step.restarts = self.at.restarts
        on_main(self.accelerator, lambda: self.folder.go_on(self.config, step))
        cut = ", parameters cut over them" if self.step.sharded else ""
        cut += f", {self.step.context} to a sequence" if self.step.context > 1 else ""
        split, primary = self.task.splits[0], self.task.primary
        for at, value in on_main(self.accelerator, lambda: self.folder.numbers(split, primary)):
            self.patience.add(at, value)
        on_main(self.accelerator, lambda: self.task.begin(self.folder.path))
        self.step.wrap()
        self.progress.announce(
            {
                **self.task.describe(),
                "training": f"{train.steps:,} steps of {train.batch_size}, {train.optimizer}, {train.precision}",
                "device": device_name(self.accelerator.device) + (f", {count} processes{cut}" if count > 1 else ""),
                **self.costs.first_screen(),
                **({"compile": COMPILING} if train.compile else {}),
                "writes to": str(self.folder.path),
                **origin,
            }
        )

    def run(self) -> dict[str, Any]:
        """Train to the end, evaluate, and return the summary."""
        self.began = self.at.units, self.at.seconds
        self.trackers.start(self.config.model_dump(mode="json"), self.at.done)
        self.progress.begin(self.at.done)
        try:
            with self.signals.stoppable(), self.costs.clock.running(), self.watch.watching():
                self.costs.clock.lap()
                return self._to_the_end()
        except WriteError as error:
            raise WriteError(f"{error}. {self._last()}") from error
        finally:
            self.step.reader.close()
            self.trackers.finish()

    def _to_the_end(self) -> dict[str, Any]:
        try:
            self._steps()
            return self._finish()
        except EvaluationStopped:
            raise self._interrupted("in the evaluation ") from None
        except StepAbandoned:
            raise self._interrupted("") from None

    def _steps(self) -> None:
        train, speed = self.train, f"{self.task.unit}_per_s"
        logged, pace, compiling = (self.at.units, self.at.seconds), 0.0, train.compile
        costs: dict[str, float] = {}
        while self.at.done < train.steps:
            if self.at.done and _due(self.at.done, self.config.eval.every) and self.patience.last_step < self.at.done:
                self._evaluate(self.task.splits[0], final=False)
                if self._stop_asked():
                    raise self._interrupted("")
                if self.patience.spent:
                    self.progress.say(f"step {self.at.done}: no better for {train.patience} evaluations, so it ends")
                    self.save()
                    return
            began = time.perf_counter()
            try:
                record, units = self.step(self.at.done)
            except NotFinite as error:
                raise TrainingDiverged(
                    f"step {self.at.done}: {error}; stopped before the update. {self._last()}"
                ) from error
            self.at.done, self.at.units = self.at.done + 1, self.at.units + units
            self.averages.after(self.at.done)
            seconds, done = time.perf_counter() - began, self.at.done
            self.at.seconds += seconds
            if compiling:
                self.progress.say(f"step {done}: {seconds:.0f} s, compiling included; a resumed run compiles again")
                compiling = False
            if done in (1, train.steps) or done % train.log_every == 0:
                pace = (self.at.units - logged[0]) / max(self.at.seconds - logged[1], 1e-9)
                logged, costs = (self.at.units, self.at.seconds), self.costs.lap(pace)
                self._record("train", {**record, speed: pace, **costs})
            self.progress.update(done, {**record, speed: pace, **costs}, self.task.unit)
            if done == 1 or done % COMPARE_EVERY == 0:
                for player in self.task.players.values():
                    compare_replicas(player.module, self.accelerator)
            if done == train.steps or _due(done, self.config.checkpoint.every):
                self.save()
            if self._stop_asked() and done < train.steps:
                raise self._interrupted("")

    def _stop_asked(self) -> bool:
        """Whether a process was asked to stop; a checkpoint that was asked for is written now."""
        stop, checkpoint = any_process([self.signals.stop, self.signals.checkpoint], self.accelerator)
        if checkpoint:
            self.signals.checkpoint = False
            self.save()
            self.progress.say(f"step {self.at.done}: {self.checkpoints.path(self.at.done)} is written, as asked")
        return stop

    def _interrupted(self, when: str) -> TrainingInterrupted:
        """Write a checkpoint of where the run is; the error that says so."""
        done = self.at.done
        if not done:
            return TrainingInterrupted("stopped before the first step was done; there is nothing to go on from")
        self.save()
        return TrainingInterrupted(
            f"stopped {when}after step {done} of {self.train.steps}; {self.checkpoints.path(done)} is written, "
            "and the same command with --resume goes on from there"
        )

    def save(self) -> None:
        """Write a checkpoint of where the run is, unless there is one already."""
        with spent("checkpoint"):
            on_main(self.accelerator, self.folder.flush)
            optimizers, averages = self.step.optimizers, self.averages.by_name
            plan, layout = self.train.steps, self.step.layout
            write_snapshot(self.checkpoints, self.at, plan, self.task, optimizers, self.accelerator, layout, averages)

    def _evaluate(self, split: str, final: bool) -> dict[str, Any]:
        """Evaluate a split and record it; by the first split's primary metric the best checkpoint is kept."""
        number = self.at.done // (self.config.eval.every or self.train.steps)
        with ExitStack() as stack:
            heard = stack.enter_context(self.trackers.listening(self.task.quantizers, number, final))
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # else every shape would be compiled anew
            with spent("evaluation"):
                values = self._numbers(split, final)
        self._record(split, values)
        if self.task.evaluates_together and self.trackers.names:
            heard.shared(self.task.crew)
        self.trackers.show(split, heard, self.at.done)
        primary, done = self.task.primary, self.at.done
        self.progress.evaluated(done, split, values, primary)
        if split == self.task.splits[0]:
            self.patience.add(done, values[primary])
            best = on_main(self.accelerator, self.checkpoints.best)
            if math.isfinite(values[primary]) and (best is None or values[primary] < best[primary]):
                self.save()
                on_main(self.accelerator, lambda: self.checkpoints.mark_best(done, primary, values[primary]))
        return values

    def _numbers(self, split: str, final: bool) -> dict[str, Any]:
        if not self.task.evaluates_together:
            return on_main(self.accelerator, lambda: self.task.evaluate(split, final), long=True)
        try:
            with views_may_leave_layers() if self.step.sharded else nullcontext():
                return self.task.evaluate(split, final)
        finally:
            for player in self.task.players.values() if self.step.sharded else ():
                let_go(player.module)

    def _record(self, split: str, values: Mapping[str, Any]) -> None:
        where = {"step": self.at.done, self.task.unit: self.at.units, "split": split}
        record = {**where, **{key: value for key, value in values.items() if key not in where}}
        on_main(self.accelerator, lambda: self.folder.record(record))
        self.trackers.log(split, record, self.at.done)

    def _last(self) -> str:
        last = self.checkpoints.last()
        return (
            "No checkpoint was written yet" if last is None else f"Last good checkpoint: {self.checkpoints.path(last)}"
        )

    def _finish(self) -> dict[str, Any]:
        """Final evaluations, the summary, and what else the task writes."""
        with self.averages.in_place():
            numbers = {split: self._evaluate(split, final=True) for split in self.task.splits}
        early = {"early_stop": self.patience.report()} if self.at.done < self.train.steps else {}
        modules = [player.module for player in self.task.players.values()]
        units, seconds = (now - then for now, then in zip((self.at.units, self.at.seconds), self.began, strict=True))
        recorded = on_main(self.accelerator, lambda: self.folder.sums("train", PREFIX))
        peak_bytes = max(everyones(self.costs.peak_bytes(), self.accelerator))
        summary = {
            "run_dir": str(self.folder.path),
            **numbers,
            "best": on_main(self.accelerator, self.checkpoints.best),
            "checkpoint": str(self.checkpoints.path(self.at.done)),
            "steps": self.at.done,
            **early,
            **self.averages.report(),
            self.task.unit: self.at.units,
            "seconds": self.at.seconds,
            f"{self.task.unit}_per_s": self.at.units / max(self.at.seconds, 1e-9),
            **sizes(modules, self.accelerator),
            "cost": self.costs.summary(recorded, units / max(seconds, 1e-9), peak_bytes),
            **made_on(self.accelerator),
        }

        def write() -> dict[str, Any] | None:
            self.task.finish(self.folder.path)
            self.folder.finish(summary)
            return self.folder.summary()

        return on_main(self.accelerator, write, long=True) or {}


def shard_of(config: RunSettings) -> str:
    """`train.shard` of a task that has it."""
    return str(getattr(config.train, "shard", "none"))


def context_of(config: RunSettings) -> int:
    """`train.context_parallel` of a task that has it."""
    return int(getattr(config.train, "context_parallel", 1))


def _due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0


def _kept_random_state(device: torch.device) -> Any:
    """The steps seed torch's global generators; give them back as they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
