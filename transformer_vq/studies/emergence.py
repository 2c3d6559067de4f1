"""When runs learn: the first evaluation at which a metric crosses the threshold that the study names.

A run that ends before that, or diverges, is censored: it is known only that it had not learned by then; one that
diverged counts as watched to the longest end, for it never will. Times are known to the step of an evaluation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pandas as pd

from transformer_vq.config.study import EmergenceConfig, StudyConfig
from transformer_vq.evaluation.plots import read_metrics
from transformer_vq.studies.outcomes import metric_of, state_of
from transformer_vq.studies.plan import Run
from transformer_vq.studies.results import Results
from transformer_vq.studies.statistics import Interval, Survival, holm, log_rank, mean_interval, survival


@dataclass(frozen=True)
class Arrival:
    """One run: when it emerged, or when watching ended."""

    seed: int
    time: float
    emerged: bool


@dataclass(frozen=True)
class Emergence:
    """One arm."""

    arm: str
    arrivals: list[Arrival]
    unit: str
    survival: Survival
    given: Interval
    """The metric at the end, on the compared split, over the seeds that emerged."""
    reference: str | None
    p: float
    """Log-rank test against the reference."""
    p_corrected: float
    """By Holm's method over all arms."""

    @property
    def emerged(self) -> int:
        """Seeds that did."""
        return sum(arrival.emerged for arrival in self.arrivals)


def emergence(results: Results) -> list[Emergence]:
    """Every arm that has a finished run, in order; [] where the study names no threshold."""
    study = results.study
    wanted = study.settings.emergence
    if wanted is None:
        return []
    watched = {
        arm: [_watch(run, wanted, study.settings) for run in results.final if run.arm == arm] for arm in results.arms
    }
    known = [found for runs in watched.values() for found in runs if found is not None]
    end = max((time for _, time, _, _ in known if math.isfinite(time)), default=math.nan)
    unit = known[0][3] if known else "step"
    arrivals = {
        arm: [Arrival(seed, time if math.isfinite(time) else end, emerged) for seed, time, emerged, _ in runs]
        for arm, found in watched.items()
        if (runs := [run for run in found if run is not None and math.isfinite(end)])
    }
    rows = []
    for arm, mine in arrivals.items():
        seeds = {arrival.seed for arrival in mine if arrival.emerged}
        finals = [r for r in results.final if r.arm == arm and r.seed in seeds]
        values = [metric_of(run, study.settings.split, wanted.metric) for run in finals]
        reference = study.design.references.get(arm)
        both = [*((a, 0) for a in mine), *((a, 1) for a in arrivals.get(reference or "", []))]
        p = log_rank([a.time for a, _ in both], [a.emerged for a, _ in both], [group for _, group in both])
        curve = survival([a.time for a in mine], [a.emerged for a in mine])
        given = mean_interval([value for value in values if math.isfinite(value)])
        rows.append(Emergence(arm, mine, unit, curve, given, reference, p, p))
    corrected = holm([row.p for row in rows])
    return [replace(row, p_corrected=p) for row, p in zip(rows, corrected, strict=True)]


def with_arrivals(runs: pd.DataFrame, results: Results) -> pd.DataFrame:
    """The table of all runs with `emerged`, and `watched_to`: the tokens or step until then, or else until the end."""
    wanted = results.study.settings.emergence
    if wanted is None:
        return runs
    watched = {run.digest: _watch(run, wanted, results.study.settings) for run in results.final}
    known = {digest: (found[2], found[1]) for digest, found in watched.items() if found is not None}
    emerged, until = zip(*(known.get(digest, (None, None)) for digest in runs["hash"]), strict=True)
    return runs.assign(emerged=emerged, watched_to=until)


def _watch(run: Run, wanted: EmergenceConfig, study: StudyConfig) -> tuple[int, float, bool, str] | None:
    """(seed, time, emerged, unit); an infinite time for a run that diverged first; None before there is a result."""
    state, path = state_of(run), run.folder / "metrics.jsonl"
    if state not in ("done", "diverged"):
        return None
    sign = -1 if (wanted.better or study.metrics.get(wanted.metric, "max")) == "min" else 1
    records = read_metrics(path) if path.is_file() else []
    mine = [r for r in records if r.get("split") == study.tune_split and r.get(wanted.metric) is not None]
    unit = "tokens" if mine and "tokens" in mine[0] else "step"
    for record in mine:
        if sign * record[wanted.metric] >= sign * wanted.at:
            return run.seed, float(record[unit]), True, unit
    if state == "diverged":
        return run.seed, math.inf, False, unit
    return (run.seed, float(mine[-1][unit]), False, unit) if mine else None
