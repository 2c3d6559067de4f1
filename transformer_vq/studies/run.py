"""Running a study: tuning first where there is any, then the runs that are compared, each configuration once."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from transformer_vq.config import ConfigError, Settings, validate
from transformer_vq.config.load import read_yaml
from transformer_vq.studies.engines import ENGINES
from transformer_vq.studies.execute import Job
from transformer_vq.studies.folder import RESULTS, read_status, study_folder
from transformer_vq.studies.gate import judge
from transformer_vq.studies.kinds import digest
from transformer_vq.studies.numbers import duration
from transformer_vq.studies.outcomes import choose, metric_of, state_of, unique
from transformer_vq.studies.plan import Run, Study

Say = Callable[[str], None]


def run_study(study: Study, at_once: int = 1, engine: str = "local", say: Say = print) -> dict[str, int]:
    """Run what is not finished; returns how many runs there are by state.

    Bases of a branch come first, then a gate's arms, and the others only where the gate holds. Finished and diverged
    runs are results and stay; interrupted and killed ones go on from their last checkpoint; failed ones are tried
    again. Raises ConfigError before anything runs: another study in the folder, or in use.
    """
    check_jobs(at_once)
    if engine not in ENGINES:
        raise ConfigError(f"--engine = {engine}: must be {', '.join(ENGINES)}")
    arms = [arm.name for arm in study.design.arms]
    gate = study.settings.gate

    def stages(of: Collection[str]) -> None:
        """Tuning, then the runs that are compared, of these arms."""
        tuning = [run for run in study.tuning_runs() if run.arm in of]
        if tuning:
            _execute(study, tuning, at_once, engine, say, "tuning")
        chosen = choose(study, study.tuning_runs())
        for arm in [name for name, values in chosen.items() if values is None and name in of] if tuning else []:
            say(f"{arm}: no tuned value finished with every seed; left out of the comparison")
        final = [run for run in study.final_runs(chosen) if run.arm in of]
        _execute(study, final, at_once, engine, say, "runs" if len(of) == len(arms) else "gate")

    with study_folder(study.settings):
        if study.settings.branch is not None:
            _execute(study, study.base_runs(), at_once, engine, say, "bases")
        if gate is not None:
            stages({gate.better, gate.than})
            verdict = judge(study)
            say(verdict.sentence())
            if not verdict.held:
                return _states(study)
        stages(arms)
    return _states(study)


def _states(study: Study) -> dict[str, int]:
    """How many runs there are by state."""
    runs = [*study.base_runs(), *study.tuning_runs(), *study.final_runs(choose(study, study.tuning_runs()))]
    states = [state_of(run) for run in unique(runs)]
    return {state: states.count(state) for state in dict.fromkeys(states)}


def check_jobs(at_once: int) -> None:
    """Raises ConfigError for fewer than one run at a time."""
    if at_once < 1:
        raise ConfigError(f"--jobs = {at_once}: must be at least 1")


def expected_runs(study: Study) -> list[Run]:
    """All runs of all stages; where tuning has not chosen yet, with the first of the tuned values."""
    tuning = study.tuning_runs()
    chosen = choose(study, tuning)
    guess = {arm: values or study.grids[arm][0] for arm, values in chosen.items()} if tuning else chosen
    return [*study.base_runs(), *tuning, *study.final_runs(guess)]


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
        "gate": None if study.settings.gate is None else study.settings.gate.model_dump(),
        "bases": len(study.base_runs()),
        "folder": str(study.folder),
        "arms": arms,
        "runs": len(unique(runs)),
        "tuning": len(unique([run for run in runs if run.stage == "tune"])),
        "finished": len(finished),
    }


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
    stuck = [run for run in todo if run.base is not None and state_of(run.base) != "done"]
    todo = [run for run in todo if run not in stuck]
    if stuck:
        seeds = ", ".join(sorted({str(run.seed) for run in stuck}, key=int))
        say(f"{what}: {len(stuck)} cannot start, for the base of seed {seeds} has not finished")
    say(f"{what}: {len(runs)}, of which {len(runs) - len(todo) - len(stuck)} are finished")
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
