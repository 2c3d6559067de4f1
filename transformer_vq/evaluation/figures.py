"""Figures of findings that are no curve over training: how keys are spread over codes, and scores by position."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from transformer_vq.evaluation.plots import GREY, shown, unknown_letters


def draw_histograms(found: Mapping[str, Any], title: str) -> Figure:
    """`layer0/code_share` and the like, as `evaluation.histograms` makes them: a panel a quantity, a line a layer."""
    panels = {
        "code_share": ("codes, the most frequent first", "share of the keys"),
        "norm_ratio": ("norm ratio ‖code‖ / ‖key‖", "share of the keys"),
        "angle": ("angle from key to code, degrees", "share of the keys"),
    }
    names = list(dict.fromkeys(name.rpartition("/")[0] for name in found))
    figure = Figure(figsize=(12.6, 3.6), layout="constrained")
    for axes, (what, (x, y)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for i, name in enumerate(names):
            counts, edges = found[f"{name}/{what}"]
            share, width = counts / max(counts.sum(), 1e-12), np.diff(edges)
            colour = colormaps["viridis"](0.92 * i / max(len(names) - 1, 1))
            axes.stairs(share / width if what == "code_share" else share, edges, color=colour, label=name)
        if what == "code_share":
            axes.set_yscale("log")
        axes.set_xlabel(x, fontsize=9)
        axes.set_ylabel(y, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(shown(title), fontsize=10, color=GREY)
    return figure


def pixels(figure: Figure) -> np.ndarray:
    """The figure as a picture: (height, width, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    with unknown_letters():
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_positions(results: Mapping[str, Sequence[Any]], trained_on: Sequence[int]) -> Figure:
    """Bits per byte over positions, a line a run, bins as `evaluation.length` makes them; dotted: lengths in training.

    The first bin, in which hardly anything has been read, would squeeze the rest and is left out where there are more.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, bins in results.items():
        plotted = bins[1:] if len(bins) > 1 else bins
        x = [math.sqrt(max(b.start, 1) * b.stop) for b in plotted]
        y, error = (np.array([getattr(b, key) for b in plotted]) for key in ("bits_per_byte", "standard_error"))
        (line,) = axes.plot(x, y, marker="o", markersize=3, linewidth=1.4, label=shown(name))
        axes.fill_between(x, y - error, y + error, color=line.get_color(), alpha=0.15, linewidth=0)
    for position in trained_on:
        axes.axvline(position, color=GREY, linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlabel("tokens read before (dotted: length in training)", fontsize=9)
    axes.set_ylabel("bits per byte (band: standard error over texts)", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure
