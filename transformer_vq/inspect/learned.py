"""One picture of what was learned, for a page or a paper: tokens by code, a map of keys and codes, attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from transformer_vq.evaluation.plots import shown
from transformer_vq.inspect.colours import INK, LINE, SOFT, code_colours
from transformer_vq.inspect.numbers import map_of
from transformer_vq.inspect.pictures import attention_bars, draw_map, part_label
from transformer_vq.inspect.reading import LayerReading

ROWS = 9
"""Codes that are listed."""
LETTERS = 30
"""Characters of a row."""


def learned(layers: Sequence[Mapping[str, Any]], readings: Mapping[int, LayerReading], chosen: int) -> Figure:
    """The codes of layer `chosen`, its first key head, and the attention of all layers."""
    layer = next(layer for layer in layers if layer["layer"] == chosen)
    reading, head = readings[chosen], layer["heads"][0]
    place, codes = map_of(reading, 0), reading.codes[0]
    colours = code_colours(place.codes)
    figure = Figure(figsize=(12.6, 3.9), layout="constrained")
    listed, mapped, attention = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    _tokens_of_codes(listed, head["by_code"][:ROWS], colours)
    counts = np.bincount(codes, minlength=len(colours))
    draw_map(mapped, place, counts, colours, codes[reading.sampled])
    attention_bars(attention, layers)
    attention.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, frameon=False, fontsize=8.5, labelcolor=INK
    )
    for axes, title in (
        (listed, f"Layer {chosen}: the tokens whose keys share a code"),
        (mapped, f"Layer {chosen}: keys (dots) and codes (circles)"),
        (attention, f"Where attention goes: {part_label(layers, 'beyond')}, window, itself"),
    ):
        axes.set_title(title, fontsize=10, color=INK, loc="left")
    return figure


def _tokens_of_codes(axes: Axes, rows: Sequence[Mapping[str, Any]], colours: Sequence[str]) -> None:
    """A line a code: its share of the keys as a bar, and its tokens, the most frequent first."""
    largest = max(row["share"] for row in rows)
    for y, row in enumerate(rows):
        axes.barh(y, 0.2 * row["share"] / largest, left=0.02, height=0.62, color=colours[row["code"]])
        share = f"{100 * row['share']:.{0 if row['share'] >= 0.1 else 1}f} %"
        axes.text(0.03 + 0.2 * row["share"] / largest, y, share, va="center", fontsize=8, color=SOFT)
        names: list[str] = []
        for token in row["tokens"]:
            if len("  ".join([*names, token["token"]])) > LETTERS:
                break
            names.append(token["token"])
        text = shown("  ".join(names), 2 * LETTERS)
        axes.text(0.4, y, text, va="center", fontsize=10, color=INK, family="monospace")
        axes.axhline(y + 0.5, color=LINE, linewidth=0.7)
    axes.set_xlim(0, 1.25)
    axes.set_ylim(len(rows) - 0.45, -0.6)
    axes.axis("off")
