"""The figures of the page. Texts are text and colours the page's own, so that both follow its theme.

Axes:  Hkv key heads  N tokens of the text  S codes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, MultipleLocator

from transformer_vq.evaluation.plots import svg
from transformer_vq.inspect.codes import Floats, Ints, Map
from transformer_vq.inspect.colours import ACCENT, BEYOND, INK, ITSELF, LINE, SOFT, WINDOW, themed

WIDE = 9.4
"""Inches of a figure as wide as the page."""
ROWS = 32
"""Codes of a raster at most."""
COLUMNS = 120
"""Stretches of text in a raster."""
BEYONDS = {"cache": "cache", "keys": "older keys"}
PARTS = (("beyond", BEYOND), ("window", WINDOW), ("itself", ITSELF))


def element(figure: Figure) -> str:
    """The figure as an `<svg>` element of the page."""
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        return themed(svg(figure))


def attention_by_layer(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """A bar a layer: what a query pays to what lies beyond the window, to the window, and to itself."""
    figure = Figure(figsize=(WIDE, 0.9 + 0.34 * len(layers)), layout="constrained")
    attention_bars(figure.add_subplot(), layers)
    figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    return figure


def attention_bars(axes: Axes, layers: Sequence[Mapping[str, Any]]) -> None:
    """The bars of `attention_by_layer`."""
    places, left = np.arange(len(layers)), np.zeros(len(layers))
    for name, colour in PARTS:
        share = np.array([layer["attention"][name] for layer in layers])
        axes.barh(places, share, left=left, color=colour, height=0.72, label=part_label(layers, name))
        for y, x, width in zip(places.tolist(), left.tolist(), share.tolist(), strict=True):
            if width >= 0.06:
                text = f"{100 * width:.0f} %"
                axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=8.5, color="white")
        left += share
    axes.set_yticks(places, [f"layer {layer['layer']}" for layer in layers])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    tidy(axes)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks([])


def attention_by_position(layers: Sequence[Mapping[str, Any]], window: int) -> Figure:
    """The same over the text, a panel a layer; the dotted line: where the first key leaves the window."""
    across = min(4, len(layers))
    down = -(-len(layers) // across)
    figure = Figure(figsize=(WIDE, 0.55 + 1.75 * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for i, axes in enumerate(grid.flat):
        if i >= len(layers):
            axes.set_visible(False)
            continue
        stretches = layers[i]["positions"]
        edges = [stretches[0]["start"], *(s["stop"] for s in stretches)]
        base = np.zeros(len(stretches))
        for name, colour in PARTS:
            top = base + np.array([s[name] for s in stretches])
            axes.stairs(top, edges, baseline=base, fill=True, facecolor=colour, edgecolor="none")
            base = top
        if edges[0] < window < edges[-1]:
            axes.axvline(window, color=INK, linestyle=":", linewidth=1)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0, 1)
        axes.set_title(f"layer {layers[i]['layer']}", fontsize=9, color=SOFT, loc="left")
        tidy(axes)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %"))
        axes.set_yticks([0, 0.5, 1])
    figure.supxlabel("position in the text, tokens", fontsize=9, color=SOFT)
    return figure


def turns(layers: Sequence[Mapping[str, Any]], angles: Sequence[Floats], ratios: Sequence[Floats]) -> Figure:
    """Distributions over keys, a ridge a layer: the angle between key and code, and the ratio of their lengths."""
    figure = Figure(figsize=(WIDE, 1.1 + 0.46 * len(layers)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [f"layer {layer['layer']}" for layer in layers]
    _ridges(left, names, [np.degrees(a) for a in angles], (0, angle_limit(angles)), 90, ACCENT)
    _ridges(right, names, ratios, ratio_limits(ratios), 90, BEYOND)
    left.xaxis.set_major_locator(MultipleLocator(angle_limit(angles) / 4))
    left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}°"))
    right.axvline(1, color=INK, linestyle=":", linewidth=1)
    left.set_xlabel("angle between a key and its code", fontsize=9, color=SOFT)
    right.set_xlabel("length of the code over that of the key", fontsize=9, color=SOFT)
    return figure


def angle_limit(angles: Sequence[Floats]) -> float:
    """The end of an axis in degrees that all but a few angles lie below."""
    largest = max((float(np.degrees(np.nanquantile(a, 0.999))) for a in angles if not np.isnan(a).all()), default=0.0)
    return next(limit for limit in (20, 40, 60, 90, 180, 360) if largest <= limit)


def ratio_limits(ratios: Sequence[Floats]) -> tuple[float, float]:
    """An axis that holds 1 and all but a few ratios."""
    low = min(1.0, *(float(np.nanquantile(r, 0.001)) for r in ratios))
    high = max(1.0, *(float(np.nanquantile(r, 0.999)) for r in ratios))
    room = max(0.06 * (high - low), 0.02)
    return max(low - room, 0.0), high + room


def _ridges(
    axes: Axes, names: Sequence[str], rows: Sequence[Floats], limits: tuple[float, float], bins: int, colour: str
) -> None:
    for y, values in enumerate(rows):
        counts, edges = np.histogram(values[~np.isnan(values)], bins=bins, range=limits)
        height = 0.88 * counts / max(int(counts.max()), 1)
        axes.stairs(y - height, edges, baseline=y, fill=True, facecolor=colour, edgecolor="none", alpha=0.75)
        axes.axhline(y, color=LINE, linewidth=0.8)
        middle = np.nanmedian(values) if counts.sum() else np.nan
        if np.isfinite(middle):
            axes.plot([middle, middle], [y, y - 0.3], color=INK, linewidth=1.4)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.75, -1.0)
    axes.set_xlim(*limits)
    tidy(axes)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def map_of_codes(place: Map, counts: Ints, colours: Sequence[str], sampled_codes: Ints) -> Figure:
    """Keys as dots in their code's colour, codes as circles whose area is their share of the keys; rings: unused codes.

    counts (S,); sampled_codes (n,) of the keys on the map.
    """
    figure = Figure(figsize=(4.6, 4.1), layout="constrained")
    draw_map(figure.add_subplot(), place, counts, colours, sampled_codes)
    return figure


def draw_map(axes: Axes, place: Map, counts: Ints, colours: Sequence[str], sampled_codes: Ints) -> None:
    """What `map_of_codes` shows."""
    shades = np.array([to_rgb(c) for c in colours])
    keys = axes.scatter(
        place.keys[:, 0], place.keys[:, 1], s=5, c=shades[sampled_codes], linewidths=0, alpha=0.55, rasterized=True
    )
    keys.set_zorder(1)
    unused, (x, y) = counts == 0, place.codes.T
    axes.scatter(x[unused], y[unused], s=9, facecolors="none", edgecolors=SOFT, linewidths=0.7, zorder=2)
    area = 14 + 260 * counts[~unused] / counts.max()
    axes.scatter(
        x[~unused], y[~unused], s=area, c=shades[~unused], edgecolors=INK, linewidths=0.6, alpha=0.85, zorder=3
    )
    axes.set_xlabel(f"first direction, {100 * place.explained[0]:.0f} % of the variance", fontsize=8.5, color=SOFT)
    axes.set_ylabel(f"second, {100 * place.explained[1]:.0f} %", fontsize=8.5, color=SOFT)
    axes.set_aspect("equal", adjustable="datalim")
    tidy(axes)
    axes.tick_params(labelsize=7.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def codes_over_text(codes: Ints, order: Sequence[int], colours: Sequence[str]) -> Figure:
    """A row a code, the most frequent first; the darker, the larger its share of a stretch of the text.

    codes (N,) of the keys in order.
    """
    rows = list(order[:ROWS])
    edges = np.unique(np.linspace(0, len(codes), min(COLUMNS, len(codes)) + 1).astype(np.int64))
    share = np.stack([np.histogram(np.flatnonzero(codes == code), edges)[0] for code in rows]) / np.diff(edges)
    picture = np.ones((*share.shape, 4))
    picture[..., :3] = np.array([to_rgb(colours[code]) for code in rows])[:, None]
    picture[..., 3] = np.sqrt(share / max(float(share.max()), 1e-12))
    figure = Figure(figsize=(4.6, 4.1), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(picture, aspect="auto", interpolation="nearest", extent=(0, len(codes), len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), [str(code) for code in rows])
    axes.set_ylabel("code", fontsize=8.5, color=SOFT)
    axes.set_xlabel("position in the text, tokens", fontsize=8.5, color=SOFT)
    tidy(axes)
    axes.grid(False)
    axes.tick_params(axis="x", labelsize=7.5)
    axes.tick_params(axis="y", length=0, pad=2, labelsize=6)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    return figure


def part_label(layers: Sequence[Mapping[str, Any]], name: str) -> str:
    """How a part of attention is called in these layers."""
    if name != "beyond":
        return {"window": "window", "itself": "the token itself"}[name]
    return (
        " or ".join(dict.fromkeys(BEYONDS[layer["memory"]] for layer in layers if layer["memory"] != "nothing"))
        or "beyond"
    )


def tidy(axes: Axes) -> None:
    """Ink that follows the page, no frame."""
    axes.tick_params(colors=SOFT, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
