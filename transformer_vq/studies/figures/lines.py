"""Lines: learning curves, and what a study asks for under `figures`."""

from __future__ import annotations

import math
import re

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from transformer_vq.config.study import FigureConfig
from transformer_vq.evaluation.plots import shown
from transformer_vq.studies.design import short_names
from transformer_vq.studies.figures.common import MOST_LINES, foremost, name_lines, styles, tidy
from transformer_vq.studies.kinds import property_of
from transformer_vq.studies.outcomes import flat, read_summary
from transformer_vq.studies.results import Results, curve
from transformer_vq.studies.statistics import mean_interval

Points = dict[str, list[tuple[float, float, float, float]]]  # line -> x, mean, low, high


def curves(results: Results) -> Figure | None:
    """The main metric on the tuning split during training: means over seeds with 95 % bands."""
    settings = results.study.settings
    drawn = []
    for arm in foremost(results):
        found = curve([r for r in results.final if r.arm == arm], settings.tune_split, settings.main_metric)
        if found is not None and len(found.x) > 1:
            drawn.append((arm, found))
    if not drawn:
        return None
    figure = Figure(figsize=(8.6, 4.4), layout="constrained")
    axes = figure.subplots()
    for (arm, c), (colour, dash) in zip(drawn, styles(), strict=False):
        axes.plot(c.x, c.mean, color=colour, linestyle=dash, linewidth=1.6, label=shown(arm))
        axes.fill_between(c.x, c.low, c.high, color=colour, alpha=0.15, linewidth=0)
    last = np.concatenate([c.mean[len(c.mean) // 4 :] for _, c in drawn])
    low, high = last.min(), last.max()
    if settings.metrics[settings.main_metric] == "min":  # the first steps would squeeze everything that follows
        axes.set_ylim(low - 0.06 * (high - low), high + 0.25 * (high - low))
    axes.set_xlabel(drawn[0][1].unit, fontsize=9.5)
    axes.set_ylabel(shown(f"{settings.tune_split} {settings.main_metric}"), fontsize=9.5)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    tidy(axes, grid="both")
    name_lines(axes)
    return figure


def lines(results: Results, wanted: FigureConfig) -> Figure | None:
    """A figure that the study asks for: y over x, one point an arm with its 95 % interval, one line a series."""
    points = _profile(results, wanted.y) if "*" in wanted.y else _points(results, wanted)
    if not points:
        return None
    figure = Figure(figsize=(8.6, 4.4), layout="constrained")
    axes = figure.subplots()
    for (name, series), (colour, dash) in zip(points.items(), styles(), strict=False):
        x, mean, low, high = np.array(sorted(series)).T
        error = np.nan_to_num(np.array([mean - low, high - mean]))
        axes.errorbar(x, mean, yerr=error, color=colour, linestyle=dash, marker="o", capsize=3, label=shown(name))
    ticks = sorted({point[0] for series in points.values() for point in series})
    if wanted.log_x:
        axes.set_xscale("log")
        ticks = [x for x in ticks if x > 0]
        if len(ticks) <= MOST_LINES:
            axes.set_xticks(ticks, _spaced(ticks))
            axes.minorticks_off()
    axes.set_xlabel(shown(wanted.x), fontsize=9.5)
    axes.set_ylabel(shown(wanted.y), fontsize=9.5)
    tidy(axes, grid="both")
    name_lines(axes)
    return figure


def _spaced(ticks: list[float]) -> list[str]:
    """Labels of ticks on a logarithmic axis, empty where one would run into the one before it."""
    texts, end = [], -math.inf
    for x in ticks:
        place = math.log(x / ticks[0]) / math.log(ticks[-1] / ticks[0]) if len(ticks) > 1 else 0.0
        half = 0.0055 * len(f"{x:g}")  # of the axis, at this figure's width
        texts.append(f"{x:g}" if place - half > end else "")
        end = place + half + 0.004 if texts[-1] else end
    return texts


def _points(results: Results, wanted: FigureConfig) -> Points:
    """One point an arm, by line."""
    study, arms = results.study, results.study.design.arms
    factors = list(arms[0].levels)
    short = short_names(factors)
    key = next((k for k in factors if wanted.x in (k, short[k])), None)
    lines_ = wanted.series if isinstance(wanted.series, dict) else {}
    by = next((k for k in factors if wanted.series in (k, short[k])), None)
    points: Points = {}
    for arm in arms:
        runs = [run for run in results.final if run.arm == arm.name]
        numbers = [flat(read_summary(run.folder)) for run in runs]
        y = mean_interval([n[wanted.y] for n in numbers if math.isfinite(n.get(wanted.y, math.nan))])
        if not y.n:
            continue
        place = property_of(wanted.x, runs[0].settings) if key is None else float(arm.levels[key])
        at = [n[wanted.x] for n in numbers if wanted.x in n] if place is None else [place]
        if at:
            rest = " · ".join(part for k, part in arm.parts.items() if k != key) or study.name
            listed = [name for name, members in lines_.items() if arm.name in members]
            for name in listed or [arm.levels[by] if by else rest]:
                points.setdefault(name, []).append((float(np.mean(at)), y.mean, y.low, y.high))
    return points


def _profile(results: Results, y: str) -> Points:
    """One line an arm, over the number in the place of the *."""
    points: Points = {}
    for arm in results.arms:
        found: dict[float, list[float]] = {}
        for run in results.final:
            for key, value in flat(read_summary(run.folder)).items() if run.arm == arm else ():
                if match := re.fullmatch(re.escape(y).replace(r"\*", r"(\d+)"), key):
                    found.setdefault(float(match[1]), []).append(value)
        for x, values in sorted(found.items()):
            interval = mean_interval(values)
            points.setdefault(arm, []).append((x, interval.mean, interval.low, interval.high))
    return points
