"""Paired differences with their intervals."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from transformer_vq.evaluation.plots import shown
from transformer_vq.studies.figures.common import ACCENT, BLUE, GREY, tidy
from transformer_vq.studies.numbers import decimals
from transformer_vq.studies.results import Comparison, Results, row_names


def forest(results: Results, metric: str) -> Figure | None:
    """Paired differences with 95 % intervals, one row a comparison; the primary one in the accent colour."""
    rows = [c for c in results.compared(metric) if c.difference.n and not c.same_runs]
    if not rows:
        return None
    names, what = row_names(results, rows)
    names = [shown(name) for name in names]
    width = 8.6 + 0.08 * max(0, max(map(len, names)) - 30)
    figure = Figure(figsize=(width, 1.5 + 0.36 * len(rows)), layout="constrained")
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
    axes.set_xlabel(f"{shown(f'{settings.split} {metric}: {what}', 120)}   ({arrow})\n{note}", fontsize=9.5)
    tidy(axes, grid="x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if delta:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8.5, borderaxespad=0.1)
    return figure


def _numbers(c: Comparison) -> str:
    d = c.difference
    digits = decimals(max(abs(d.mean), 0 if math.isnan(d.high) else d.high - d.low))
    interval = f" [{d.low:+.{digits}f}, {d.high:+.{digits}f}]" if d.n > 1 else " [one pair]"
    return f"{d.mean:+.{digits}f}{interval} n={d.n}"
