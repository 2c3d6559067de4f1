"""How long will it take? Short runs of the real thing, in a temporary folder, so that nothing is left behind.

Time of a run = what it costs with two steps + (steps - 2) · time of a step + evaluations on the way. Each is a
difference between two short runs of one warm worker. Arms that have finished runs need no trial: their own times are
better.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from transformer_vq.config import ConfigError
from transformer_vq.studies.engines import local
from transformer_vq.studies.execute import Job
from transformer_vq.studies.folder import RESULTS, read_status
from transformer_vq.studies.outcomes import state_of, unique
from transformer_vq.studies.plan import Run, Study
from transformer_vq.studies.run import expected_runs, job_of

ARMS = 4  # arms that are tried; the others are taken to cost the mean of those
FEW, MORE = 2, 10  # steps of the runs that are compared


@dataclass(frozen=True)
class Estimate:
    """Seconds of work that are left, on one worker; and by arm, what a run takes."""

    seconds: float
    by_arm: dict[str, float]
    tried: list[str]


def estimate(study: Study) -> Estimate:
    """Measure how long the unfinished runs will take.  Raises ConfigError when a trial does not run through."""
    runs = expected_runs(study)
    finished: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        if state_of(run) == "done" and (seconds := read_status(run.folder).get("seconds")):
            finished[run.arm].append(seconds)
    left = [run for run in unique(runs) if state_of(run) not in RESULTS]
    by_arm = {arm: mean(seconds) for arm, seconds in finished.items()}
    unknown = list({run.arm: run for run in left if run.arm not in by_arm}.values())
    tried = [unknown[i * len(unknown) // min(ARMS, len(unknown))] for i in range(min(ARMS, len(unknown)))]
    for run in tried:
        by_arm[run.arm] = _try(study, run)
    typical = mean(by_arm.values()) if by_arm else 0.0
    seconds = sum(by_arm.get(run.arm, typical) for run in left)
    return Estimate(seconds, by_arm, [run.arm for run in tried])


def _try(study: Study, run: Run) -> float:
    """Seconds that one run of this arm takes."""
    with tempfile.TemporaryDirectory(prefix="transformer-vq-trial-") as scratch:
        plans = {"warm": (1, None), "few": (FEW, None), "more": (MORE, None), "evaluated": (FEW, 1)}
        jobs = {name: _short(study, run, Path(scratch) / name, *plan) for name, plan in plans.items()}
        for job, state in local(list(jobs.values()), 1, study.settings.engine):
            if state != "done":
                status = read_status(Path(job.folder))
                raise ConfigError(f"a trial of {run.arm} ended: {state}; {status.get('error')}")
        time = {name: read_status(Path(job.folder))["seconds"] for name, job in jobs.items()}
    steps = run.settings.train.steps  # type: ignore[attr-defined]
    every = run.settings.eval.every  # type: ignore[attr-defined]
    step = max(time["more"] - time["few"], 0.0) / (MORE - FEW)
    evaluation = max(time["evaluated"] - time["few"], 0.0)
    return float(time["few"] + max(steps - FEW, 0) * step + (steps // every if every else 0) * evaluation)


def _short(study: Study, run: Run, folder: Path, steps: int, evaluate: int | None) -> Job:
    settings = run.settings
    shorter = {"steps": steps} | ({"init_from": None} if run.base else {})  # there is no base yet, and it costs nothing
    settings = settings.model_copy(
        update={
            "run_dir": str(folder),
            "train": settings.train.model_copy(update=shorter),  # type: ignore[attr-defined]
            "eval": settings.eval.model_copy(update={"every": evaluate}),  # type: ignore[attr-defined]
            "checkpoint": settings.checkpoint.model_copy(update={"every": None}),  # type: ignore[attr-defined]
        }
    )
    folder.mkdir()
    return replace(job_of(run, study), folder=str(folder), config=settings.model_dump(mode="json"))
