"""All numbers of the page: what `--json` prints, and what tables and pictures are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transformer_vq.inspect.codes import Map, TopToken, perplexity, principal_map, told, top_tokens
from transformer_vq.inspect.reading import LayerReading
from transformer_vq.inspect.spelling import Speller

TOKENS = 8
"""Most frequent tokens of a code that are named."""
CONTEXTS = 3
"""Of those, the ones that are shown in context."""
SHARES = ("itself", "window", "beyond")
QUANTILES = {"p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}


def layers_of(readings: Mapping[int, LayerReading], tokens: NDArray[Any], speller: Speller) -> list[dict[str, Any]]:
    """One object a layer, JSON's types alone:

    layer, kind, estimator, codes (a head; None without), quantizes, memory (what lies beyond the window: `cache`,
    `keys` or `nothing`), attention and positions (shares of attention, means over query heads and tokens; each stretch
    start … stop−1), by_head (the same as `attention`, a query head each), heads (a key head each, see `head_of`).
    """
    return [{"layer": i, **_layer(reading, tokens, speller)} for i, reading in readings.items()]


def _layer(reading: LayerReading, tokens: NDArray[Any], speller: Speller) -> dict[str, Any]:
    layer = reading.layer
    sizes = np.diff(reading.edges)
    each = reading.shares / sizes  # (3, H, bins)
    overall = reading.shares.sum(-1) / sizes.sum()
    stretches = zip(reading.edges[:-1].tolist(), reading.edges[1:].tolist(), each.mean(1).T.tolist(), strict=True)
    return {
        "kind": layer.kind,
        "estimator": getattr(getattr(layer.quantizer, "config", None), "estimator", None),
        "codes": reading.codebook.shape[1] if reading.has_codes else None,
        "quantizes": layer.quantizes,
        "memory": "keys" if layer.keeps_every_key else "cache" if layer.config.cache else "nothing",
        "attention": dict(zip(SHARES, overall.mean(1).tolist(), strict=True)),
        "by_head": [dict(zip(SHARES, row, strict=True)) for row in overall.T.tolist()],
        "positions": [{"start": a, "stop": b, **dict(zip(SHARES, row, strict=True))} for a, b, row in stretches],
        "heads": [head_of(reading, h, tokens, speller) for h in range(len(reading.codes))] if reading.has_codes else [],
    }


def head_of(reading: LayerReading, h: int, tokens: NDArray[Any], speller: Speller) -> dict[str, Any]:
    """What the codes of one key head did.

    head, used, perplexity; told (how often a key's code is guessed right in the second half of the text, from its
    token, from the token before, and from nothing, see `codes.told`); angle (degrees) and ratio of keys to their codes,
    mean and quantiles; map (shares of variance); by_code, the most frequent first: code, count, share, attention (the
    share of all attention of this head's queries that the code gets from beyond the window), mean angle and ratio,
    x and y on the map, tokens, contexts.
    """
    layer, codes, size = reading.layer, reading.codes[h], reading.codebook.shape[1]
    counts = np.bincount(codes, minlength=size)
    groups = layer.config.heads // len(reading.codes)
    attention = reading.by_code[h] / (len(codes) * groups)
    top, place = top_tokens(codes, tokens, TOKENS), map_of(reading, h)
    angle, ratio = np.degrees(reading.angle[h].astype(np.float64)), reading.ratio[h].astype(np.float64)
    means = {name: mean_by_code(values, codes, size) for name, values in (("angle", angle), ("ratio", ratio))}
    by_code = [
        {
            "code": code,
            "count": int(counts[code]),
            "share": int(counts[code]) / len(codes),
            "attention": float(attention[code]),
            **{name: _number(values[code]) for name, values in means.items()},
            "x": float(place.codes[code, 0]),
            "y": float(place.codes[code, 1]),
            "tokens": [{"id": t.token, "token": speller.name(t.token), "count": t.times} for t in top[code]],
            "contexts": [_context(t, speller) for t in top[code][:CONTEXTS]],
        }
        for code in sorted(top, key=lambda code: (-counts[code], code))
    ]
    return {
        "head": h,
        "used": len(by_code),
        "perplexity": perplexity(counts),
        "told": {
            "token": told(codes, tokens, size),
            "previous": told(codes[1:], tokens[:-1], size),
            "nothing": told(codes, None, size),
        },
        "angle": spread(angle),
        "ratio": spread(ratio),
        "map": {"explained": list(place.explained)},
        "by_code": by_code,
    }


def map_of(reading: LayerReading, h: int) -> Map:
    """The map of one key head."""
    keys, codebook = reading.keys[h], reading.codebook[h].numpy()
    return principal_map(reading.gram[h], reading.sum[h], reading.codes.shape[1], codebook, keys)


def spread(values: NDArray[np.float64]) -> dict[str, float | None]:
    """Mean and quantiles of what is a number; None where nothing is."""
    known = values[~np.isnan(values)]
    if not len(known):
        return dict.fromkeys(["mean", *QUANTILES])
    found = np.quantile(known, list(QUANTILES.values())).tolist()
    return {"mean": float(known.mean()), **dict(zip(QUANTILES, found, strict=True))}


def mean_by_code(values: NDArray[np.float64], codes: NDArray[Any], size: int) -> NDArray[np.float64]:
    """Mean over the tokens of each code, (size,); NaN where there is no number."""
    known = ~np.isnan(values)
    counts = np.bincount(codes[known], minlength=size)
    sums = np.bincount(codes[known], weights=values[known], minlength=size)
    means: NDArray[np.float64] = np.divide(sums, counts, out=np.full(size, np.nan), where=counts > 0)
    return means


def _context(top: TopToken, speller: Speller) -> dict[str, Any]:
    before, token, after = speller.around(top.at)
    return {"at": top.at, "before": before, "token": token, "after": after}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def mean_of_heads(layer: Mapping[str, Any], *path: str) -> float | None:
    """Mean over key heads of a number somewhere in `heads`; None without one."""
    found: list[float] = []
    for head in layer["heads"]:
        value: Any = head
        for key in path:
            value = value[key]
        if value is not None:
            found.append(value)
    return sum(found) / len(found) if found else None


def words(layer: Mapping[str, Any]) -> Sequence[str]:
    """What does not apply to this layer, in sentences."""
    notes = []
    if layer["kind"] == "none":
        notes.append("Keys are not quantized here, so there are no codes, no map and nothing to turn.")
    elif not layer["quantizes"]:
        notes.append(
            "The quantizer has not started yet: attention reads the keys themselves; codes are as they would be."
        )
    if layer["memory"] == "keys":
        notes.append(
            "Full attention: every key is kept, and what lies beyond the window is seen exactly, not through codes."
        )
    elif layer["memory"] == "nothing":
        notes.append("There is no cache (model.cache: false): nothing beyond the window is seen.")
    return notes
