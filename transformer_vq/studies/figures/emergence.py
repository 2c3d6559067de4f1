"""How many seeds have learned, over training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from transformer_vq.evaluation.plots import shown
from transformer_vq.studies.emergence import Emergence
from transformer_vq.studies.figures.common import MOST_LINES, name_lines, styles, tidy

BANDS = 3  # with more lines than this, their bands would hide each other


def emerged(found: Sequence[Emergence]) -> Figure | None:
    """Kaplan–Meier curves, upside down: the share of seeds that have emerged; a tick where watching a seed ended."""
    drawn = [row for row in found if row.arrivals][:MOST_LINES]
    if not drawn:
        return None
    figure = Figure(figsize=(8.6, 4.4), layout="constrained")
    axes = figure.subplots()
    end = max(arrival.time for row in drawn for arrival in row.arrivals)
    for i, (row, (colour, dash)) in enumerate(zip(drawn, styles(), strict=False)):
        curve = row.survival
        last = max(arrival.time for arrival in row.arrivals)
        x = np.concatenate([[0], curve.times, [last]])
        lift = 0.006 * (i - (len(drawn) - 1) / 2)  # so that lines that coincide can be told apart
        y, low, high = (
            np.concatenate([[0], 1 - share, 1 - share[-1:] if share.size else [0]])
            for share in (curve.share, curve.high, curve.low)
        )
        label = f"{shown(row.arm)}  {row.emerged} of {len(row.arrivals)}"
        axes.step(x, y + lift, where="post", color=colour, linestyle=dash, linewidth=1.8, label=label)
        if len(drawn) <= BANDS:
            known = np.isfinite(low) & np.isfinite(high)
            axes.fill_between(x, low, high, where=known, step="post", color=colour, alpha=0.13, linewidth=0)
        ended = sorted({arrival.time for arrival in row.arrivals if not arrival.emerged})
        level = [y[np.searchsorted(x[:-1], time, side="right") - 1] + lift for time in ended]
        axes.plot(ended, level, "|", color=colour, markersize=9, markeredgewidth=1.6)
    axes.set_xlim(0, end * 1.02)
    axes.set_ylim(-0.04, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(drawn[0].unit, fontsize=9.5)
    axes.set_ylabel("share of seeds that have emerged", fontsize=9.5)
    tidy(axes, grid="both")
    name_lines(axes)
    return figure
