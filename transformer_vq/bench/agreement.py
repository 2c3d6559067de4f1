"""How far an estimator's gradients agree with the true ones, with intervals, over all keys and by thirds of them.

See gradient.py for what cosine and length are. Resamples draw keys with replacement; one set of resamples serves all
estimators, so that a difference of two of them is a difference within each resample. Simulated, an interval that says
95 % covers 95 % of the time where all keys' gradients are about as long, and 90 % where a few are most of the sum.

Axes:  N keys  E estimators  R resamples
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 2000
CONFIDENCE = 0.95
FEWEST = 8  # keys of which an interval says something
THIRDS = ("lowest", "middle", "highest")
Floats = NDArray[np.float64]


class Products(NamedTuple):
    """Inner products of gradients, key by key: g of an estimator, h the true one (see gradient.py)."""

    gg: Floats
    """(E, N): ‖g‖²."""
    gh: Floats
    """(E, N): ⟨g, h⟩."""
    hh: Floats
    """(N): ⟨h₁, h₂⟩, unbiased for the square of the true length; may be negative."""


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % bootstrap interval; NaN where it cannot be told."""

    value: float
    low: float
    high: float

    @property
    def resolved(self) -> bool:
        """Whether number and interval are there."""
        return all(map(math.isfinite, (self.value, self.low, self.high)))


@dataclass(frozen=True)
class Agreement:
    """One estimator against the truth, at one width of noise, over a group of keys."""

    sigma: float
    estimator: str
    group: str
    """all | angle lowest | angle middle | … | ratio highest: thirds of the layer's keys."""
    keys: int
    cosine: Estimate
    length: Estimate
    nearer: Estimate
    """Its cosine less that of the first estimator."""


def agreements(
    names: Sequence[str],
    sigmas: Sequence[float],
    products: Sequence[Products],
    by: Mapping[str, Sequence[float]],
    seed: int = 0,
) -> list[Agreement]:
    """Every estimator, width of noise and group; `by` holds what keys are split into thirds by, (N) each."""
    found = []
    for group, members in groups(len(products[0].hh), by).items():
        size = len(members)
        draw = np.random.default_rng(seed)
        weights = np.vstack([np.ones(size), draw.multinomial(size, np.full(size, 1 / size), RESAMPLES)])  # (1 + R, n)
        for sigma, whole in zip(sigmas, products, strict=True):
            part = Products(whole.gg[:, members], whole.gh[:, members], whole.hh[members])
            cosine, length = pooled(part, weights)
            for name, c, ratio in zip(names, cosine, length, strict=True):
                values = [_estimate(x, size) for x in (c, ratio, c - cosine[0])]
                found.append(Agreement(sigma, name, group, size, *values))
    return found


def groups(count: int, by: Mapping[str, Sequence[float]]) -> dict[str, NDArray[np.int64]]:
    """Name -> keys: all of them, and thirds by rank of each quantity."""
    found = {"all": np.arange(count)}
    for name, values in by.items():
        ranked = np.argsort(np.asarray(values), kind="stable")
        found |= {f"{name} {third}": part for third, part in zip(THIRDS, np.array_split(ranked, 3), strict=True)}
    return found


def pooled(products: Products, weights: Floats) -> tuple[Floats, Floats]:
    """Cosine and ratio of lengths, (E, R) each, of keys counted by `weights` (R, N); NaN where the truth is noise."""
    gg, gh, hh = (x @ weights.T for x in products)
    with np.errstate(divide="ignore", invalid="ignore"):
        known = np.where((hh > 0) & (gg > 0), hh, np.nan)
        return gh / np.sqrt(gg * known), np.sqrt(gg / known)


def _estimate(values: Floats, keys: int) -> Estimate:
    """The first of (1 + R) values, and percentiles of the others; none where a resample has none, or of few keys.

    The percentiles are widened as t is wider than the normal distribution [Hesterberg 2015, the expanded percentile].
    """
    if keys < FEWEST:
        return Estimate(float(values[0]), math.nan, math.nan)
    width = math.sqrt(keys / (keys - 1)) * stats.t.ppf((1 + CONFIDENCE) / 2, keys - 1)
    edge = float(stats.norm.cdf(-width))
    low, high = np.quantile(values[1:], [edge, 1 - edge])
    return Estimate(float(values[0]), float(low), float(high))
