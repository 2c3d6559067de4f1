"""One HTML file, everything inside: words, tables, pictures as SVG, and a text in the colours of its codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from transformer_vq import __version__
from transformer_vq.evaluation.plots import PICTURES, Records, draw
from transformer_vq.inspect import pictures
from transformer_vq.inspect.colours import code_colours
from transformer_vq.inspect.numbers import map_of, mean_of_heads, words
from transformer_vq.inspect.reading import LayerReading
from transformer_vq.inspect.spelling import Speller, visible

READER = 1200
"""Tokens of the text that is shown in colours."""


@dataclass(frozen=True)
class Inspected:
    """What the page is made from."""

    run: str
    step: int
    text: str
    """Which text, in words."""
    command: str
    layers: list[dict[str, Any]]
    """See `numbers.layers_of`."""
    readings: Mapping[int, LayerReading]
    tokens: NDArray[Any]
    speller: Speller
    records: Records
    """Of `metrics.jsonl`, for codes over training; may be empty."""
    window: int


def render(page: Inspected, codes: int) -> str:
    """The page; `codes` a head are listed, the most frequent ones."""
    environment = Environment(
        loader=PackageLoader("transformer_vq.inspect"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "short": short}
    coded = [layer for layer in page.layers if layer["heads"]]
    return environment.get_template("page.html").render(
        page=page,
        version=__version__,
        tokens=len(page.tokens),
        findings=findings(page),
        summary=[summary(layer) for layer in page.layers],
        beyond=pictures.part_label(page.layers, "beyond"),
        pictures=overview(page, coded),
        sections=[section(page, layer, codes) for layer in page.layers],
        reader=reader(page, coded) if coded else None,
        codes=codes,
    )


def overview(page: Inspected, coded: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The figures over all layers, by name; those that have something to show."""
    found = {
        "layers": pictures.attention_by_layer(page.layers),
        "positions": pictures.attention_by_position(page.layers, page.window),
    }
    if coded:
        angles, ratios = (
            [getattr(page.readings[layer["layer"]], name).ravel() for layer in coded] for name in ("angle", "ratio")
        )
        found["turns"] = pictures.turns(coded, angles, ratios)
    training = draw(page.records, PICTURES["codebooks"], title="", shades="rainbow")
    if training is not None:
        found["training"] = training
    return {name: pictures.element(figure) for name, figure in found.items()}


def summary(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table of layers; means over key heads."""
    names = {"used": ("used",), "perplexity": ("perplexity",), "angle": ("angle", "mean"), "ratio": ("ratio", "mean")}
    told = {f"told_{name}": ("told", name) for name in ("token", "previous", "nothing")}
    return {**layer, **{name: mean_of_heads(layer, *path) for name, path in (names | told).items()}}


def section(page: Inspected, layer: Mapping[str, Any], most: int) -> dict[str, Any]:
    """What one layer's part of the page shows."""
    reading = page.readings[layer["layer"]]
    heads = []
    for h, head in enumerate(layer["heads"]):
        place, codes = map_of(reading, h), reading.codes[h]
        colours, counts = code_colours(place.codes), np.bincount(codes, minlength=len(place.codes))
        order = [row["code"] for row in head["by_code"]]
        heads.append(
            {
                **head,
                "map_picture": pictures.element(pictures.map_of_codes(place, counts, colours, codes[reading.sampled])),
                "text_picture": pictures.element(pictures.codes_over_text(codes, order, colours)),
                "listed": [{**row, "colour": colours[row["code"]]} for row in head["by_code"][:most]],
            }
        )
    return {**layer, "notes": words(layer), "heads": heads, "size": layer["codes"]}


def reader(page: Inspected, coded: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first tokens, and by layer and head the code of each and the colours of all codes."""
    shown = min(READER, len(page.tokens))
    views = []
    for layer in coded:
        reading = page.readings[layer["layer"]]
        for h in range(len(reading.codes)):
            views.append(
                {
                    "name": f"layer {layer['layer']}" + (f", head {h}" if len(reading.codes) > 1 else ""),
                    "codes": reading.codes[h, :shown].tolist(),
                    "colours": code_colours(map_of(reading, h).codes),
                }
            )
    pieces = [visible(page.speller.bytes_at(i), spaces=False) for i in range(shown)]
    return {"pieces": [piece.replace("⏎", "⏎\n") for piece in pieces], "views": views}


def findings(page: Inspected) -> list[str]:
    """What the numbers say, in a few sentences."""
    said = []
    cached = [layer for layer in page.layers if layer["memory"] == "cache"]
    if cached and len(page.tokens) > page.window + 1:
        most = max(cached, key=lambda layer: layer["attention"]["beyond"])
        mean = sum(layer["attention"]["beyond"] for layer in cached) / len(cached)
        said.append(
            f"{percent(mean)} of attention goes through the cache to what lies beyond the window of {page.window} "
            f"tokens; most in layer {most['layer']}, {percent(most['attention']['beyond'])}."
        )
    elif cached:
        said.append(f"The text is not longer than the window of {page.window} tokens, so nothing is in a cache yet.")
    told = {layer["layer"]: mean_of_heads(layer, "told", "token") for layer in page.layers}
    known = {i: value for i, value in told.items() if value is not None}
    if known:
        high, low = max(known, key=known.__getitem__), min(known, key=known.__getitem__)
        text = f"In layer {high} the token alone tells the code of its key {percent(known[high])} of the time"
        said.append(text + (f", in layer {low} {percent(known[low])}." if low != high else "."))
    turned = {layer["layer"]: mean_of_heads(layer, "angle", "mean") for layer in page.layers}
    angles = {i: value for i, value in turned.items() if value is not None}
    if angles:
        high, low = max(angles, key=angles.__getitem__), min(angles, key=angles.__getitem__)
        between = f"{angles[low]:.0f}° in layer {low} and {angles[high]:.0f}° in layer {high}"
        where = f"between {between}" if low != high else f"{angles[low]:.0f}° in layer {low}"
        said.append(f"From a key to its code is {where} on average.")
    return said


def percent(share: float | None) -> str:
    """23 %, 0.4 % (spaces that do not break), – where there is none."""
    if share is None:
        return "–"
    value = 100 * share
    digits = 0 if value >= 10 or value == 0 else 1
    text = f"{value:.{digits}f} %" if value >= 0.1 or value == 0 else "< 0.1 %"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def short(value: float | None, digits: int = 3) -> str:
    """A number as a table has it; – where there is none."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) or float(value).is_integer() else f"{value:.{digits}g}"
