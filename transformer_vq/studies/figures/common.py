"""What the pictures of a report share: colours, lines, axes, and which arms are drawn when there are too many."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from transformer_vq.studies.results import Results

ACCENT, BLUE, GREY, LIGHT = "#c8553d", "#33658a", "#6b7280", "#e5e7eb"
SERIES = ("#33658a", "#c8553d", "#5a8f4e", "#8e6c8a", "#d9a441", "#2a9d8f", "#7a5c3e", "#b56576", "#4f5d75", "#9aa53c")
DASHES = ("-", "--", ":", "-.")
MOST_LINES = 10


def foremost(results: Results) -> list[str]:
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


def styles() -> Iterator[tuple[str, str]]:
    """(colour, dash) for one line after the other."""
    return cycle((colour, dash) for dash in DASHES for colour in SERIES)


def tidy(axes: Axes, grid: str) -> None:
    """Light lines behind, no frame, few ticks."""
    axes.grid(axis=grid, color=LIGHT, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9ca3af")
    axes.xaxis.set_major_locator(MaxNLocator(6)) if axes.get_xscale() == "linear" else None


def name_lines(axes: Axes) -> None:
    """A legend beside the lines, not on them."""
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
