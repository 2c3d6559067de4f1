"""The pictures of a report. Each takes the results; returns a figure, or None where there is nothing to show."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from transformer_vq.config.study import FigureConfig
from transformer_vq.studies.design import LAYER, short_names
from transformer_vq.studies.kinds import property_of
from transformer_vq.studies.results import Comparison, Results, curve, health
from transformer_vq.studies.run import flat, read_summary
from transformer_vq.studies.statistics import mean_interval

ACCENT, BLUE, GREY, LIGHT = "#c8553d", "#33658a", "#6b7280", "#e5e7eb"
SERIES = ("#33658a", "#c8553d", "#5a8f4e", "#8e6c8a", "#d9a441", "#2a9d8f", "#7a5c3e", "#b56576", "#4f5d75", "#9aa53c")
DASHES = ("-", "--", ":", "-.")
MOST_LINES = 10
Points = dict[str, list[tuple[float, float, float, float]]]  # line -> x, mean, low, high
HEALTH = {"usage": "share of codes in use", "perplexity": "perplexity of the codes", "relative_error": "‖k − q‖ / ‖k‖"}


def forest(results: Results, metric: str) -> Figure | None:
    """Paired differences with 95 % intervals, one row a comparison; the primary one in the accent colour."""
    rows = [c for c in results.compared(metric) if c.difference.n and not c.same_runs]
    if not rows:
        return None
    names, what = row_names(results, rows)
    figure = Figure(figsize=(8.6, 1.5 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    settings = results.study.settings
    delta = settings.equivalence if metric == settings.main_metric else None
    if delta:
        axes.axvspan(-delta, delta, color="#dcefe0", zorder=0, label=f"±δ = {delta:g}")
    axes.axvline(0, color=GREY, linewidth=1, zorder=1)
    places = range(len(rows))[::-1]
    for y, c in zip(places, rows, strict=True):
        colour, d = ACCENT if c.primary else BLUE, c.difference
        if d.n > 1:
            axes.plot([d.low, d.high], [y, y], color=colour, linewidth=2.2, solid_capstyle="round", zorder=2)
        axes.plot(d.mean, y, "o", color=colour, markersize=7 if c.primary else 5.5, zorder=3)
    axes.set_yticks(list(places), names, fontsize=9.5)
    for tick, c in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set(color=ACCENT if c.primary else "black", fontweight="bold" if c.primary else "normal")
    axes.set_ylim(-0.7, len(rows) - 0.3)
    right = axes.secondary_yaxis("right")
    right.set_yticks(list(places), [_numbers(c) for c in rows], fontsize=8.5, family="monospace")
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)
    arrow = "← better" if settings.metrics[metric] == "min" else "better →"
    note = "95 % t intervals of paired differences, uncorrected"
    axes.set_xlabel(f"{settings.split} {metric}: {what}   ({arrow})\n{note}", fontsize=9.5)
    _tidy(axes, grid="x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if delta:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8.5, borderaxespad=0.1)
    return figure


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


def _numbers(c: Comparison) -> str:
    d = c.difference
    digits = decimals(max(abs(d.mean), 0 if math.isnan(d.high) else d.high - d.low))
    interval = f" [{d.low:+.{digits}f}, {d.high:+.{digits}f}]" if d.n > 1 else " [one pair]"
    return f"{d.mean:+.{digits}f}{interval} n={d.n}"


def decimals(size: float) -> int:
    """Decimals that show a number of this size with three significant digits."""
    return 3 if size == 0 or not math.isfinite(size) else max(0, min(8, 2 - math.floor(math.log10(size))))


def curves(results: Results) -> Figure | None:
    """The main metric on the tuning split during training: means over seeds with 95 % bands."""
    settings = results.study.settings
    drawn = []
    for arm in _foremost(results):
        found = curve([r for r in results.final if r.arm == arm], settings.tune_split, settings.main_metric)
        if found is not None and len(found.x) > 1:
            drawn.append((arm, found))
    if not drawn:
        return None
    figure = Figure(figsize=(8.6, 4.4), layout="constrained")
    axes = figure.subplots()
    for (arm, c), (colour, dash) in zip(drawn, _styles(), strict=False):
        axes.plot(c.x, c.mean, color=colour, linestyle=dash, linewidth=1.6, label=arm)
        axes.fill_between(c.x, c.low, c.high, color=colour, alpha=0.15, linewidth=0)
    last = np.concatenate([c.mean[len(c.mean) // 4 :] for _, c in drawn])
    low, high = last.min(), last.max()
    if settings.metrics[settings.main_metric] == "min":  # the first steps would squeeze everything that follows
        axes.set_ylim(low - 0.06 * (high - low), high + 0.25 * (high - low))
    axes.set_xlabel(drawn[0][1].unit, fontsize=9.5)
    axes.set_ylabel(f"{settings.tune_split} {settings.main_metric}", fontsize=9.5)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _tidy(axes, grid="both")
    axes.legend(frameon=False, fontsize=8.5, ncols=1 if len(drawn) < 6 else 2)
    return figure


def _foremost(results: Results) -> list[str]:
    """The arms worth a line when there are too many: the primary, its reference, then the best."""
    metric = results.study.settings.main_metric
    arms = [arm for arm in results.arms if results.values(arm, metric)]
    if len(arms) <= MOST_LINES:
        return arms
    sign = 1 if results.study.settings.metrics[metric] == "min" else -1
    ranked = sorted(arms, key=lambda arm: sign * results.interval(arm, metric).mean)
    first = [results.primary.arm, results.primary.reference] if results.primary else []
    first += list(dict.fromkeys(results.study.design.references.values()))[:2]
    kept = list(dict.fromkeys([*first, *ranked]))[:MOST_LINES]
    return [arm for arm in arms if arm in kept]


def layer_map(results: Results) -> Figure | None:
    """Level × layer: the paired difference that a level makes in one layer, and everywhere; leave-one-layer designs."""
    arms = results.study.design.arms
    if not any(LAYER in arm.levels for arm in arms):
        return None
    metric = results.study.settings.main_metric
    found = {c.arm: c for c in results.compared(metric) if c.difference.n}
    factor = next(key for key in arms[0].levels if key != LAYER)
    rows = list(dict.fromkeys(arm.levels[factor] for arm in arms if arm.name in found))
    columns = [*sorted({arm.levels[LAYER] for arm in arms} - {"all"}, key=int), "all"]
    values = np.full((len(rows), len(columns)), np.nan)
    texts: dict[tuple[int, ...], str] = {}
    for arm in arms:
        if arm.name in found:
            place = rows.index(arm.levels[factor]), columns.index(arm.levels[LAYER])
            d = found[arm.name].difference
            values[place] = d.mean
            clear = d.low > 0 or d.high < 0
            texts[place] = f"{d.mean:+.{decimals(np.nanmax(np.abs(values)))}f}" + ("*" if clear else "")
    if not rows:
        return None
    names = ["everywhere" if name == "all" else f"layer {name}" for name in columns]
    figure = Figure(figsize=(max(5.0, 2.2 + 0.95 * len(columns)), 1.5 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    _heat(axes, values, texts, rows, names, diverging=True, low_is_good=results.study.settings.metrics[metric] == "min")
    out = results.study.settings.design == "leave_one_layer_out"
    what = "taking it out of one layer" if out else "putting it into one layer"
    title = f"{results.study.settings.split} {metric}: difference by {what}\n* interval excludes 0, uncorrected"
    axes.set_title(title, fontsize=9, color=GREY)
    return figure


def grid_map(results: Results) -> Figure | None:
    """Means of the main metric over the first two factors, a panel for each combination of the others."""
    arms = results.study.design.arms
    factors = list(arms[0].levels)
    if len(factors) < 2 or LAYER in factors:
        return None
    metric = results.study.settings.main_metric
    by_size = sorted(factors, key=lambda key: -len({arm.levels[key] for arm in arms}))[:2]
    down, across = (key for key in factors if key in by_size)
    others = [key for key in factors if key not in by_size]
    rows, columns = ([*dict.fromkeys(arm.levels[key] for arm in arms)] for key in (down, across))
    panels = list(dict.fromkeys(tuple(arm.levels[key] for key in others) for arm in arms))
    short = short_names(factors)
    grids = {panel: np.full((len(rows), len(columns)), np.nan) for panel in panels}
    for arm in arms:
        place = rows.index(arm.levels[down]), columns.index(arm.levels[across])
        grids[tuple(arm.levels[key] for key in others)][place] = results.interval(arm.name, metric).mean
    finite = np.concatenate([grid[np.isfinite(grid)] for grid in grids.values()])
    if finite.size == 0:
        return None
    width = (1.4 + 0.85 * len(columns)) * len(panels)
    figure = Figure(figsize=(min(14.0, max(5.0, 1.2 + width)), 1.6 + 0.45 * len(rows)), layout="constrained")
    digits = decimals(float(np.ptp(finite)) / 10 or 1.0)
    for i, (axes, panel) in enumerate(zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True)):
        grid = grids[panel]
        texts = {place: f"{grid[place]:.{digits}f}" for place in np.ndindex(grid.shape) if np.isfinite(grid[place])}
        good = results.study.settings.metrics[metric] == "min"
        _heat(axes, grid, texts, rows if i == 0 else [""] * len(rows), columns, False, good, finite.min(), finite.max())
        axes.set_xlabel(short[across], fontsize=9.5)
        if i == 0:
            axes.set_ylabel(short[down], fontsize=9.5)
        title = ", ".join(f"{short[key]}: {name}" for key, name in zip(others, panel, strict=True))
        axes.set_title(title or f"{results.study.settings.split} {metric}, mean over seeds", fontsize=9, color=GREY)
    return figure


def health_map(results: Results) -> Figure | None:
    """Arm × layer, a panel a quantity: usage, perplexity, relative error of the finished models."""
    arms = _foremost(results)
    found = {arm: health(results, arm) for arm in arms}
    arms = [arm for arm in arms if found[arm]]
    panels = [name for name in HEALTH if any(name in found[arm] for arm in arms)]
    if not panels:
        return None
    layers = sorted({layer for arm in arms for name in panels for layer in found[arm].get(name, {})})
    longest = 0.075 * max(map(len, arms))
    wide = 0.62 if len(layers) <= 8 else 0.4
    width = 1.0 + longest + len(panels) * (0.7 + wide * len(layers))
    figure = Figure(figsize=(min(15.0, width), 1.3 + 0.36 * len(arms)), layout="constrained")
    for i, (axes, name) in enumerate(zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True)):
        values = np.array([[found[arm].get(name, {}).get(layer, np.nan) for layer in layers] for arm in arms])
        digits = 0 if name == "perplexity" and np.nanmax(values) >= 10 else 2
        few = len(layers) <= 12
        texts = {p: f"{values[p]:.{digits}f}" for p in np.ndindex(values.shape) if few and np.isfinite(values[p])}
        names = arms if i == 0 else [""] * len(arms)
        _heat(axes, values, texts, names, [str(layer) for layer in layers], False, name == "relative_error")
        axes.set_title(HEALTH[name], fontsize=9, color=GREY)
        axes.set_xlabel("layer", fontsize=9)
    return figure


def lines(results: Results, wanted: FigureConfig) -> Figure | None:
    """A figure that the study asks for: y over x, one point an arm with its 95 % interval, one line a series."""
    points = _profile(results, wanted.y) if "*" in wanted.y else _points(results, wanted)
    if not points:
        return None
    figure = Figure(figsize=(8.6, 4.4), layout="constrained")
    axes = figure.subplots()
    for (name, series), (colour, dash) in zip(points.items(), _styles(), strict=False):
        x, mean, low, high = np.array(sorted(series)).T
        error = np.nan_to_num(np.array([mean - low, high - mean]))
        axes.errorbar(x, mean, yerr=error, color=colour, linestyle=dash, marker="o", capsize=3, label=name)
    ticks = sorted({point[0] for series in points.values() for point in series})
    if wanted.log_x:
        axes.set_xscale("log")
        ticks = [x for x in ticks if x > 0]
        if len(ticks) <= MOST_LINES:
            axes.set_xticks(ticks, _spaced(ticks))
            axes.minorticks_off()
    axes.set_xlabel(wanted.x, fontsize=9.5)
    axes.set_ylabel(wanted.y, fontsize=9.5)
    _tidy(axes, grid="both")
    axes.legend(frameon=False, fontsize=8.5)
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


def _heat(
    axes: Axes,
    values: np.ndarray,
    texts: dict[tuple[int, ...], str],
    rows: Sequence[str],
    columns: Sequence[str],
    diverging: bool,
    low_is_good: bool,
    low: float | None = None,
    high: float | None = None,
) -> None:
    """Coloured cells with their numbers; green is better. Cells without a number stay grey."""
    axes.set_facecolor(LIGHT)
    known = values[np.isfinite(values)]
    if diverging:
        size = max(float(np.abs(known).max()), 1e-12)
        colours, norm = "BrBG_r" if low_is_good else "BrBG", TwoSlopeNorm(0, -1.6 * size, 1.6 * size)
    else:
        low, high = (known.min() if low is None else low), (known.max() if high is None else high)
        span = (high - low) or 1.0
        colours, norm = "YlGnBu_r" if low_is_good else "YlGnBu", None
        low, high = low - (0.9 if low_is_good else 0.1) * span, high + (0.1 if low_is_good else 0.9) * span
    limits = {"norm": norm} if norm is not None else {"vmin": low, "vmax": high}
    axes.imshow(np.ma.masked_invalid(values), cmap=colours, aspect="auto", **limits)
    for (i, j), text in texts.items():
        axes.text(j, i, text, ha="center", va="center", fontsize=8.5)
    axes.set_xticks(range(len(columns)), columns, fontsize=8.5, rotation=0 if max(map(len, columns)) < 11 else 30)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def _styles() -> cycle[tuple[str, str]]:
    return cycle((colour, dash) for dash in DASHES for colour in SERIES)


def _tidy(axes: Axes, grid: str) -> None:
    axes.grid(axis=grid, color=LIGHT, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9ca3af")
    axes.xaxis.set_major_locator(MaxNLocator(6)) if axes.get_xscale() == "linear" else None
