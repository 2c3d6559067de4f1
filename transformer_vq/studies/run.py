"""Running a study: tuning first where there is any, then the runs that are compared, each configuration once."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformer_vq.config import ConfigError, Settings, validate
from transformer_vq.config.load import read_yaml
from transformer_vq.studies.engines import ENGINES
from transformer_vq.studies.execute import Job
from transformer_vq.studies.folder import RESULTS, read_status, study_folder
from transformer_vq.studies.kinds import digest
from transformer_vq.studies.plan import Run, Study

Say = Callable[[str], None]


def run_study(study: Study, at_once: int = 1, engine: str = "local", say: Say = print) -> dict[str, int]:
    """Run what is not finished; returns how many runs there are by state.

    Finished and diverged runs are results and stay; interrupted and killed ones go on from their last checkpoint;
    failed ones are tried again. Raises ConfigError before anything runs: another study in the folder, or in use.
    """
    check_jobs(at_once)
    if engine not in ENGINES:
        raise ConfigError(f"--engine = {engine}: must be {', '.join(ENGINES)}")
    with study_folder(study.settings):
        tuning = study.tuning_runs()
        if tuning:
            _execute(study, tuning, at_once, engine, say, "tuning")
        chosen = choose(study, tuning)
        for arm in [name for name, values in chosen.items() if values is None] if tuning else []:
            say(f"{arm}: no tuned value finished with every seed; left out of the comparison")
        final = study.final_runs(chosen)
        _execute(study, final, at_once, engine, say, "runs")
    states = [state_of(run) for run in unique([*tuning, *final])]
    return {state: states.count(state) for state in dict.fromkeys(states)}


def check_jobs(at_once: int) -> None:
    """Raises ConfigError for fewer than one run at a time."""
    if at_once < 1:
        raise ConfigError(f"--jobs = {at_once}: must be at least 1")


def choose(study: Study, tuning: list[Run]) -> dict[str, dict[str, Any] | None]:
    """By arm: the tuned values with the best mean of the main metric on the tuning split.

    Values with a run that diverged, or has no such number, are out; None where nothing is left, or runs are missing.
    """
    metric = study.settings.main_metric
    sign = 1 if study.settings.metrics[metric] == "min" else -1
    chosen: dict[str, dict[str, Any] | None] = {}
    for arm in study.design.arms:
        best, chosen[arm.name] = math.inf, None
        mine = [run for run in tuning if run.arm == arm.name]
        if any(state_of(run) not in RESULTS for run in mine):
            continue
        for tuned in study.grids[arm.name] if mine else []:
            values = [metric_of(run, study.settings.tune_split, metric) for run in mine if run.tuned == tuned]
            mean = sign * sum(values) / len(values)
            if mean < best:  # NaN is not
                best, chosen[arm.name] = mean, tuned
    return chosen


def expected_runs(study: Study) -> list[Run]:
    """All runs of both stages; where tuning has not chosen yet, with the first of the tuned values."""
    tuning = study.tuning_runs()
    chosen = choose(study, tuning)
    guess = {arm: values or study.grids[arm][0] for arm, values in chosen.items()} if tuning else chosen
    return [*tuning, *study.final_runs(guess)]


def outline(study: Study) -> dict[str, Any]:
    """The plan in numbers: arms with their runs and references, and totals."""
    runs = expected_runs(study)
    finished = {run.digest for run in unique(runs) if state_of(run) in RESULTS}
    arms = []
    for arm in study.design.arms:
        mine = unique([run for run in runs if run.arm == arm.name])
        reference = study.design.references.get(arm.name)
        primary = arm.name == study.design.primary
        done = sum(run.digest in finished for run in mine)
        arms.append({"name": arm.name, "runs": len(mine), "finished": done, "reference": reference, "primary": primary})
    return {
        "question": study.settings.question,
        "folder": str(study.folder),
        "arms": arms,
        "runs": len(unique(runs)),
        "tuning": len(unique([run for run in runs if run.stage == "tune"])),
        "finished": len(finished),
    }


def state_of(run: Run) -> str:
    """done, diverged, out_of_memory, failed, interrupted, killed, running or waiting."""
    return str(read_status(run.folder)["state"])


def metric_of(run: Run, split: str, metric: str) -> float:
    """A number of a run's summary, `layers/usage` being the mean of `layer0/usage`, …; NaN where it has none."""
    numbers = flat(read_summary(run.folder).get(split, {}))
    if metric.startswith("layers/"):
        of_layers = [v for k, v in numbers.items() if re.fullmatch(r"layer\d+" + re.escape(metric[6:]), k)]
        return sum(of_layers) / len(of_layers) if of_layers else math.nan
    return float(numbers.get(metric, math.nan))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of nested dicts as `a/b/c`."""
    numbers: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            numbers |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[prefix + str(key)] = value
    return numbers


def read_summary(folder: Path) -> dict[str, Any]:
    """A run's final numbers; {} before it has any."""
    path = folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def unique(runs: list[Run]) -> list[Run]:
    """One run of each configuration, in order."""
    return list({run.digest: run for run in reversed(runs)}.values())[::-1]


def job_of(run: Run, study: Study) -> Job:
    """What a worker needs to know."""
    return Job(
        folder=str(run.folder.absolute()),
        config=run.settings.model_dump(mode="json"),
        schema=study.kind.schema,
        runner=study.kind.runner,
        command=run.command,
        cwd=str(Path.cwd()),
        path=tuple(sys.path),
    )


def _execute(study: Study, runs: list[Run], at_once: int, engine: str, say: Say, what: str) -> None:
    runs = unique(runs)
    for run in runs:
        _same_configuration(run)
    todo = [run for run in runs if state_of(run) not in RESULTS]
    say(f"{what}: {len(runs)}, of which {len(runs) - len(todo)} are finished")
    if not todo:
        return
    for run in todo:
        run.folder.mkdir(parents=True, exist_ok=True)
    by_folder = {str(run.folder.absolute()): run for run in todo}
    start, jobs = time.monotonic(), [job_of(run, study) for run in todo]
    for count, (job, state) in enumerate(
        ENGINES[engine](jobs, min(at_once, len(jobs)), study.settings.engine), start=1
    ):
        run, status = by_folder[job.folder], read_status(Path(job.folder))
        left = (time.monotonic() - start) / count * (len(todo) - count)
        split = study.settings.tune_split if run.stage == "tune" else study.settings.split
        name = study.settings.main_metric
        number = f"{split} {name} {metric_of(run, split, name):.4f}" if state == "done" else status.get("error") or ""
        say(
            f"[{count}/{len(todo)}] {' '.join(run.arm.split())}, seed {run.seed}: {state}, {number}"
            f" ({status.get('seconds', 0):.0f} s; {duration(left)} left)"
        )


def _same_configuration(run: Run) -> None:
    """Raises ConfigError when the folder that bears a run's hash holds something else."""
    path = run.folder / "config.yaml"
    if path.is_file() and digest(_stored(path, run.settings)) != run.digest:
        raise ConfigError(f"{run.folder}: holds another configuration than its name says; delete it or move it away")


def _stored(path: Path, settings: Settings) -> Settings:
    tree = read_yaml(path)
    if "model" in tree and getattr(settings, "model").vocab_size is None:  # noqa: B009  # filled in from the tokenizer
        tree["model"]["vocab_size"] = None
    return validate(tree, type(settings))


def duration(seconds: float) -> str:
    """A time in words: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
