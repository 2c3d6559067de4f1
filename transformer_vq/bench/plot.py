"""Log-log pictures of benchmarks: time over size, one line an implementation, above the roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformer_vq.bench.comparison import floor, lines
from transformer_vq.bench.device import Ceilings
from transformer_vq.files import write

Points = Sequence[tuple[float, float, float, float]]
"""x, lower quartile, median, upper quartile; seconds."""


def over_size(
    target: Path, sides: Mapping[str, Points], least: Sequence[tuple[float, float]], x_label: str, title: str
) -> None:
    """Write a PNG, SVG or PDF.  sides: by implementation. least: x, and the least seconds this device could take."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, points) in enumerate(sides.items()):
        xs = [p[0] for p in points]
        color = f"C{i}"
        axes.plot(xs, [1e3 * p[2] for p in points], "o-", color=color, label=name, markersize=4)
        axes.fill_between(xs, [1e3 * p[1] for p in points], [1e3 * p[3] for p in points], color=color, alpha=0.2)
    if least:
        xs, ys = [p[0] for p in least], [1e3 * p[1] for p in least]
        axes.plot(xs, ys, "--", color="0.4", label="roofline of ours")
    axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel="milliseconds", title=title)
    ticks = sorted({p[0] for points in sides.values() for p in points})
    axes.set_xticks(ticks, [f"{int(x):,}" for x in ticks], rotation=30 if len(ticks) > 4 else 0)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    write(target, lambda part: figure.savefig(part, format=target.suffix[1:], dpi=130))


def picture(module: Any, rows: Sequence[dict[str, Any]], ceilings: Ceilings, target: Path, title: str) -> None:
    """Of a benchmark module that has sizes, its AXIS."""
    axis: str = module.AXIS
    over_size(target, lines(rows, axis), floor(rows, axis, ceilings), axis.replace("_", " "), title)
