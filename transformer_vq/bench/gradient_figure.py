"""Picture of `compare`: cosines with the smoothed gradient, a column a layer; all keys on top, thirds of them below."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from transformer_vq.bench.agreement import THIRDS, Agreement
from transformer_vq.bench.gradient import LayerGradients


def draw(found: Sequence[LayerGradients]) -> Figure:
    """found: of at least one layer."""
    names = list(dict.fromkeys(a.estimator for a in found[0].agreements))
    sigmas = [truth.sigma for truth in found[0].truths]
    middle = sigmas[len(sigmas) // 2]
    figure = Figure(figsize=(2.0 + 2.6 * len(found), 3 * (0.9 + 0.26 * len(names))), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(3, len(found), sharex=True, sharey=True, squeeze=False)
    for column, layer in enumerate(found):
        everywhere = [a for a in layer.agreements if a.group == "all"]
        _points(grid[0][column], names, {f"noise {s:g}": [a for a in everywhere if a.sigma == s] for s in sigmas})
        grid[0][column].set_title(f"layer {layer.layer}", fontsize=9)
        for row, what in enumerate(("angle", "ratio"), start=1):
            parts = {
                third: [a for a in layer.agreements if a.group == f"{what} {third}" and a.sigma == middle]
                for third in THIRDS
            }
            _points(grid[row][column], names, parts)
    for row, label in enumerate(("all keys", f"by angle, noise {middle:g}", f"by |q|/|k|, noise {middle:g}")):
        grid[row][0].set_ylabel(label, fontsize=8)
        grid[row][-1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.supxlabel("cosine with the gradient of the smoothed loss, 95 % intervals over keys", fontsize=8)
    return figure


def _points(axes: Axes, names: Sequence[str], series: dict[str, list[Agreement]]) -> None:
    """A line a name, in it a point and interval of each series; what is not resolved is left out."""
    shades = colormaps["viridis"]
    for number, (label, found) in enumerate(series.items()):
        offset = 0.5 * (number + 0.5) / len(series) - 0.25
        colour = shades(0.15 + 0.7 * number / max(1, len(series) - 1))
        known = [a for a in found if a.cosine.resolved]
        axes.plot([], [], ".", color=colour, label=label)
        for a in known:
            y = names.index(a.estimator) + offset
            axes.plot([a.cosine.low, a.cosine.high], [y, y], color=colour, linewidth=1)
            axes.plot([a.cosine.value], [y], ".", color=colour, markersize=5)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.axvline(0, color="#999999", linewidth=0.6)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
