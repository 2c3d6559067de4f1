"""Coloured tables: a level by layer, a grid of factors, codebooks by arm and layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from transformer_vq.evaluation.plots import shown
from transformer_vq.studies.design import LAYER, short_names
from transformer_vq.studies.figures.common import GREY, LIGHT, foremost
from transformer_vq.studies.numbers import decimals
from transformer_vq.studies.results import Results, health

HEALTH = {"usage": "share of codes in use", "perplexity": "perplexity of the codes", "relative_error": "‖k − q‖ / ‖k‖"}


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
    title = (
        f"{shown(f'{results.study.settings.split} {metric}')}: difference by {what}\n* interval excludes 0, uncorrected"
    )
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
        axes.set_xlabel(shown(short[across]), fontsize=9.5)
        if i == 0:
            axes.set_ylabel(shown(short[down]), fontsize=9.5)
        title = ", ".join(f"{short[key]}: {name}" for key, name in zip(others, panel, strict=True))
        axes.set_title(
            shown(title or f"{results.study.settings.split} {metric}, mean over seeds"), fontsize=9, color=GREY
        )
    return figure


def health_map(results: Results) -> Figure | None:
    """Arm × layer, a panel a quantity: usage, perplexity, relative error of the finished models."""
    arms = foremost(results)
    found = {arm: health(results, arm) for arm in arms}
    arms = [arm for arm in arms if found[arm]]
    panels = [name for name in HEALTH if any(name in found[arm] for arm in arms)]
    if not panels:
        return None
    layers = sorted({layer for arm in arms for name in panels for layer in found[arm].get(name, {})})
    longest = 0.075 * max(len(shown(arm, 40)) for arm in arms)
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
    rows, columns = [shown(name, 40) for name in rows], [shown(name, 30) for name in columns]
    axes.set_xticks(range(len(columns)), columns, fontsize=8.5, rotation=0 if max(map(len, columns)) < 11 else 30)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
