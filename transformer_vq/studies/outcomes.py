"""What has become of runs: their states, their numbers, and the tuned values that follow from those."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformer_vq.studies.folder import RESULTS, read_status
from transformer_vq.studies.plan import Run, Study


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
