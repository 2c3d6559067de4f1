"""Colours: of codes by their place on the map, so that codes that lie together look alike; of the page, in two themes.

Pictures are drawn in the colours below and set into the page with a name in place of each, whose value is the theme's.
"""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray

INK, SOFT, LINE = "#1f2937", "#6b7280", "#e5e7eb"
ITSELF, WINDOW, BEYOND, ACCENT = "#c8553d", "#d9a441", "#33658a", "#7a4fa3"
THEME = {
    INK: "--ink",
    SOFT: "--soft",
    LINE: "--line",
    ITSELF: "--itself",
    WINDOW: "--window",
    BEYOND: "--beyond",
    ACCENT: "--accent",
}
"""Colour in a figure -> variable of the page."""
OTHERS = {"#000000": INK, "#555555": SOFT, "#e4e4e4": LINE, "#262626": INK}
"""What figures of other modules, and matplotlib itself, draw in."""


def themed(svg: str) -> str:
    """An SVG element whose colours follow the page."""
    for colour, ours in OTHERS.items():
        svg = svg.replace(colour, ours)
    for colour, name in THEME.items():
        svg = svg.replace(colour, f"var({name})")
    return svg


def code_colours(places: NDArray[np.floating]) -> list[str]:
    """places (S, 2) on a map -> a colour each: the hue says in which direction, the saturation how far from the middle.

    Of middling lightness, to be seen on white and on black.
    """
    if not len(places):
        return []
    centred = places - places.mean(0)
    radius = np.hypot(*centred.T)
    radius = radius / max(float(radius.max()), 1e-12)
    hue = np.arctan2(centred[:, 1], centred[:, 0]) / (2 * np.pi) % 1
    shades = zip(hue.tolist(), (0.3 + 0.5 * radius).tolist(), strict=True)
    return [_hex(colorsys.hls_to_rgb(hue, 0.54, saturation)) for hue, saturation in shades]


def _hex(rgb: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * x):02x}" for x in rgb)
