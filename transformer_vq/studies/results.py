"""What a study has found so far: one table of all runs, and the comparisons. Reads run folders, writes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from transformer_vq.evaluation.pieces import read_pieces
from transformer_vq.evaluation.plots import read_metrics
from transformer_vq.studies.design import label, short_names
from transformer_vq.studies.folder import read_status
from transformer_vq.studies.gate import Verdict, judge
from transformer_vq.studies.markdown import clean
from transformer_vq.studies.outcomes import choose, flat, metric_of, read_summary, state_of
from transformer_vq.studies.plan import Run, Study
from transformer_vq.studies.second_look import SecondLook, second_look
from transformer_vq.studies.statistics import (
    Interval,
    Paired,
    detectable,
    equivalent,
    holm,
    mean_interval,
    paired,
    seeds_needed,
)


@dataclass(frozen=True)
class Comparison:
    """An arm against its reference in one metric: arm minus reference, paired by seed."""

    metric: str
    arm: str
    reference: str
    primary: bool
    difference: Paired
    p_corrected: float
    """By Holm's method over all exploratory comparisons; the primary one's own p."""
    equivalent: bool | None
    """Whether the interval lies inside ±δ; None without δ, and in other metrics than the main one."""
    detectable: float
    seeds_needed: int | None
    """To find a difference of δ with 80 % probability; None without δ, or where no number would do."""
    missing: int
    """Seeds of the plan that make no pair, because a run diverged, failed or is not there yet."""
    same_runs: bool
    """Both arms are the same configuration."""
    look: SecondLook | None = None
    """Over pieces of the split too, of the same pairs; None where runs did not keep them."""


@dataclass(frozen=True)
class Results:
    """Everything that a report shows."""

    study: Study
    bases: list[Run]
    tuning: list[Run]
    final: list[Run]
    chosen: dict[str, dict[str, Any] | None]
    """Tuned values by arm."""
    comparisons: list[Comparison]
    gate: Verdict | None = None

    @property
    def arms(self) -> list[str]:
        """Names in the order of the design."""
        return [arm.name for arm in self.study.design.arms]

    def values(self, arm: str, metric: str) -> dict[int, float]:
        """By seed, the finite values of a metric on the split that is compared."""
        return _values(self.study, self.final, arm, metric)

    def interval(self, arm: str, metric: str) -> Interval:
        """Mean over seeds."""
        return mean_interval(list(self.values(arm, metric).values()))

    def compared(self, metric: str) -> list[Comparison]:
        """Comparisons in one metric, in the order of the design."""
        return [c for c in self.comparisons if c.metric == metric]

    @property
    def primary(self) -> Comparison | None:
        """The comparison that was named beforehand."""
        return next((c for c in self.comparisons if c.primary), None)


def collect(study: Study) -> Results:
    """Read what there is."""
    tuning = study.tuning_runs()
    chosen = choose(study, tuning)
    final = study.final_runs(chosen)
    return Results(
        study,
        study.base_runs(),
        tuning,
        final,
        chosen,
        _compare(study, final),
        None if study.settings.gate is None else judge(study),
    )


def _values(study: Study, runs: Iterable[Run], arm: str, metric: str) -> dict[int, float]:
    values = {run.seed: metric_of(run, study.settings.split, metric) for run in runs if run.arm == arm}
    return {seed: value for seed, value in values.items() if math.isfinite(value)}


def _compare(study: Study, final: list[Run]) -> list[Comparison]:
    settings, design = study.settings, study.design
    delta, seeds = settings.equivalence, len(settings.seeds)
    digests = {arm.name: {run.digest for run in final if run.arm == arm.name} for arm in design.arms}
    found = []
    for metric in settings.metrics:
        main = metric == settings.main_metric
        for arm, reference in design.references.items():
            a, b = (_values(study, final, name, metric) for name in (arm, reference))
            both = sorted(a.keys() & b.keys())
            difference = paired([a[seed] for seed in both], [b[seed] for seed in both])
            found.append(
                Comparison(
                    metric,
                    arm,
                    reference,
                    primary=main and arm == design.primary,
                    difference=difference,
                    p_corrected=difference.p,
                    equivalent=equivalent(difference, delta) if delta and main else None,
                    detectable=detectable(difference.sd, difference.n),
                    seeds_needed=seeds_needed(difference.sd, delta) if delta and main and difference.n > 1 else None,
                    missing=seeds - len(both),
                    same_runs=bool(digests[arm]) and digests[arm] == digests[reference],
                    look=_second_look(study, final, metric, (arm, reference), both),
                )
            )
    exploratory = [c for c in found if not c.primary and not c.same_runs]
    corrected = dict(zip(map(id, exploratory), holm([c.difference.p for c in exploratory]), strict=True))
    return [replace(c, p_corrected=corrected.get(id(c), c.p_corrected)) for c in found]


def _second_look(
    study: Study, final: list[Run], metric: str, pair: tuple[str, str], seeds: Sequence[int]
) -> SecondLook | None:
    """Of these seeds' pairs; None unless every run has kept its pieces of that metric."""
    folders = {(run.arm, run.seed): run.folder for run in final}
    kept = [[read_pieces(folders[arm, seed], study.settings.split).get(metric) for seed in seeds] for arm in pair]
    arm, reference = ([piecewise for piecewise in runs if piecewise is not None] for runs in kept)
    return second_look(arm, reference) if len(arm) == len(reference) == len(seeds) else None


def row_names(results: Results, rows: Sequence[Comparison]) -> tuple[list[str], str]:
    """A short name for each comparison, and what the difference is: what is common to all rows is said once."""
    found = [results.study.design.contrasts()[c.arm] for c in rows]
    whats = {what for _, what in found}
    references = {c.reference for c in rows}
    if len(references) == 1:
        return [c.arm for c in rows], f"difference from {rows[0].reference}"
    if len(whats) == 1 and whats != {""}:
        return [where for where, _ in found], whats.pop()
    return [": ".join(filter(None, pair)) for pair in found], "difference from the reference"


def table(results: Results) -> pd.DataFrame:
    """All runs, one a row: levels, seed, stage, tuned values, state, time, every number of the summary, the command.

    `seconds` is the whole run, start and evaluations too; `training_seconds` is what its summary calls `seconds`.
    """
    study = results.study
    factors = short_names(dict.fromkeys(key for arm in study.design.arms for key in arm.levels))
    tuned = short_names(study.settings.tune)
    rows = []
    for run in [*results.bases, *results.tuning, *results.final]:
        status = read_status(run.folder)
        summary = flat(read_summary(run.folder))
        if "seconds" in summary:
            summary["training_seconds"] = summary.pop("seconds")
        levels = {} if run.stage == "base" else study.design.arm(run.arm).levels
        rows.append(
            {
                "arm": run.arm,
                **{f"level/{short}": levels.get(key) for key, short in factors.items()},
                "seed": run.seed,
                "stage": run.stage,
                **{f"tuned/{short}": run.tuned.get(key) for key, short in tuned.items()},
                "state": status["state"],
                "error": status.get("error"),
                "seconds": status.get("seconds"),
                "hash": run.digest,
                "folder": run.folder.name,
                "commit": status.get("commit"),
                **summary,
                "command": run.command,
            }
        )
    return pd.DataFrame(rows).apply(_one_type)


def _one_type(column: pd.Series[Any]) -> pd.Series[Any]:
    """Numbers stay numbers; in a column that holds anything else all is text, as files of tables want it."""
    if all(value is None or isinstance(value, int | float) for value in column):
        return column
    return column.map(lambda value: None if value is None else clean(label(value)))


@dataclass(frozen=True)
class Curve:
    """Mean over seeds of a metric on the tuning split during training, with its t interval where seeds allow."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    unit: str


def curve(runs: Iterable[Run], split: str, metric: str) -> Curve | None:
    """Over finished runs of one arm, at the points that all of them have; None where there are none."""
    series: list[dict[Any, Any]] = []
    unit = "step"
    for run in runs:
        path = run.folder / "metrics.jsonl"
        if state_of(run) != "done" or not path.is_file():
            continue
        records = [r for r in read_metrics(path) if r.get("split") == split and r.get(metric) is not None]
        unit = "tokens" if records and "tokens" in records[0] else unit
        series.append({record.get("tokens", record["step"]): record[metric] for record in records})
    common: list[float] = sorted(set.intersection(*map(set, series))) if series else []
    if not common:
        return None
    intervals = [mean_interval([values[x] for values in series]) for x in common]
    mean, low, high = np.array([(i.mean, i.low, i.high) for i in intervals]).T
    return Curve(np.array(common, dtype=float), mean, low, high, unit)


def health(results: Results, arm: str) -> dict[str, dict[int, float]]:
    """name -> layer -> mean over seeds, from entries like `layer0/usage` of the compared split's summary."""
    sums: dict[str, dict[int, list[float]]] = {}
    for run in results.final:
        if run.arm == arm:
            for key, value in flat(read_summary(run.folder).get(results.study.settings.split, {})).items():
                first, _, name = key.partition("/")
                if name and first.startswith("layer") and first[5:].isdigit():
                    sums.setdefault(name, {}).setdefault(int(first[5:]), []).append(value)
    return {name: {i: float(np.mean(v)) for i, v in sorted(layers.items())} for name, layers in sums.items()}


def failures(results: Results) -> list[dict[str, Any]]:
    """Runs that have started and given no number, with what is known about them."""
    rows = []
    for run in [*results.bases, *results.tuning, *results.final]:
        status = read_status(run.folder)
        state = status["state"]
        split = results.study.settings.tune_split if run.stage == "tune" else results.study.settings.split
        if state == "done" and math.isnan(metric_of(run, split, results.study.settings.main_metric)):
            status = {**status, "error": f"{split} {results.study.settings.main_metric} is missing or not finite"}
        elif state in ("done", "waiting"):
            continue
        log = f"{run.folder.name}/log.txt"
        rows.append({"run": run, "state": state, "error": status.get("error") or "", "log": log})
    return rows
