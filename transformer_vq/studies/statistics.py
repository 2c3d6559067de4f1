"""Statistics over seeds: intervals, paired differences, Holm, equivalence, power; from scipy and statsmodels.

Runs of two arms with the same seed see the same batches in the same order, so differences are taken within a seed; the
spread between seeds that both arms share drops out. Intervals are 95 % and uncorrected; p-values of exploratory
comparisons are corrected by Holm's method, the primary comparison's is not.

A spread that is rounding is none. Numbers are known to `ROUNDING` units in the last place of the largest of them, a
unit being 2^-52 of its size, or 2^-23 when every number is one of fp32's. Where differences spread by no more, there is
no noise to test against: no p-value (1 where the differences are themselves rounding: the same twice), no power.
Values of which one is not finite have no mean, and nothing follows from them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.duration.survfunc import SurvfuncRight, survdiff
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

CONFIDENCE, POWER = 0.95, 0.8
ROUNDING = 8  # units in the last place: two inputs, their difference, and sums over a few of them
MOST_SEEDS = 1_000_000
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean over n seeds with its 95 % t interval (NaN bounds for n < 2) and the standard deviation over seeds."""

    mean: float
    low: float
    high: float
    sd: float
    n: int


@dataclass(frozen=True)
class Paired(Interval):
    """The mean difference of n pairs, and the p-value of the paired t test."""

    p: float


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and t interval of values over seeds; no width where their spread is rounding."""
    return _interval(np.asarray(values, dtype=float), rounding(values))


def paired(arm: Sequence[float], reference: Sequence[float]) -> Paired:
    """Arm minus reference, pair by pair (one pair a seed).

    Differences that are all the same, to rounding, have no spread to test against: p is 1 where they are zero, to
    rounding (one configuration twice), else NaN.  Raises ValueError when the lengths differ.
    """
    if len(arm) != len(reference):
        raise ValueError(f"{len(arm)} values cannot be paired with {len(reference)}")
    unit = rounding([*arm, *reference])
    a, b = (np.asarray(x, dtype=float) for x in (arm, reference))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Paired(math.nan, math.nan, math.nan, math.nan, len(a), math.nan)
    scale = _scale([a, b])
    interval = _interval(a / scale - b / scale, unit / scale)
    if interval.n < 2 or interval.sd == 0:
        p = 1.0 if interval.n > 1 and abs(interval.mean) <= unit / scale else math.nan
    else:
        p = float(stats.ttest_rel(a / scale, b / scale).pvalue)
    mean, low, high, sd = (scale * x for x in (interval.mean, interval.low, interval.high, interval.sd))
    return Paired(mean, low, high, sd, interval.n, p)


def rounding(values: Sequence[float]) -> float:
    """How far apart two numbers may lie that differ by rounding alone, among numbers of this size; 0 where none is.

    The module's text has the rule. Numbers are taken for fp32's when fp32 holds each of them exactly and one at least
    is no short binary fraction (more than 12 bits), so that 1, 2 and 0.5 tell nothing.
    """
    x = np.asarray(values, dtype=float)
    x = x[np.isfinite(x)]
    if not x.size or not (largest := float(np.abs(x).max())):
        return 0.0
    with np.errstate(over="ignore", under="ignore"):
        narrow = x.astype(np.float32).astype(float)
    mantissas = np.ldexp(np.frexp(x)[0], 12)
    fp32 = bool((narrow == x).all()) and bool((mantissas != np.round(mantissas)).any())
    return largest * (ROUNDING * float(np.finfo(np.float32 if fp32 else np.float64).eps))


def _interval(x: Floats, unit: float) -> Interval:
    """Mean and t interval of x, whose values are known to `unit`."""
    if not np.isfinite(x).all():
        return Interval(math.nan, math.nan, math.nan, math.nan, x.size)
    if x.size < 2:
        return Interval(float(x[0]) if x.size else math.nan, math.nan, math.nan, math.nan, x.size)
    scale = _scale([x])
    x = x / scale  # so that squares neither overflow nor vanish
    mean = float(x.mean())
    if np.ptp(x) <= unit / scale:
        return Interval(mean * scale, mean * scale, mean * scale, 0.0, x.size)
    low, high = stats.t.interval(CONFIDENCE, x.size - 1, loc=mean, scale=stats.sem(x))
    return Interval(mean * scale, float(low) * scale, float(high) * scale, float(x.std(ddof=1)) * scale, x.size)


def _scale(arrays: Sequence[Floats]) -> float:
    """A power of two of the size of the largest value: dividing by it is exact."""
    largest = max((float(np.abs(x).max()) for x in arrays if x.size), default=0.0)
    return math.ldexp(1.0, min(max(math.frexp(largest)[1], -1000), 1000)) if largest else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected by Holm's step-down method; NaN stays NaN and does not count."""
    corrected = np.asarray(p_values, dtype=float).copy()
    known = ~np.isnan(corrected)
    if known.any():
        corrected[known] = multipletests(corrected[known], method="holm")[1]
    levels: list[float] = corrected.tolist()
    return levels


@dataclass(frozen=True)
class Survival:
    """Kaplan–Meier: the share that has not had the event after each of `times`, with a pointwise 95 % band."""

    times: Floats
    share: Floats
    low: Floats
    high: Floats
    median: float
    """The first time at which half or more have had it; NaN where that never comes."""


def survival(times: Sequence[float], happened: Sequence[bool]) -> Survival:
    """Kaplan–Meier estimate; where the event has not `happened`, the time is when watching ended.

    The band is Greenwood's on the log-log scale; it is not known where nobody or everybody has had the event.
    """
    if not any(happened):
        empty = np.empty(0)
        return Survival(empty, empty, empty, empty, math.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = SurvfuncRight(np.asarray(times, dtype=float), np.asarray(happened, dtype=int))
        share = np.asarray(found.surv_prob, dtype=float)
        spread = 1.959964 * np.asarray(found.surv_prob_se) / (share * np.log(share))
        low, high = share ** np.exp(-spread), share ** np.exp(spread)
    half = np.flatnonzero(share <= 0.5 + 1e-12)
    reached = np.asarray(found.surv_times, dtype=float)
    return Survival(reached, share, low, high, float(reached[half[0]]) if half.size else math.nan)


def log_rank(times: Sequence[float], happened: Sequence[bool], group: Sequence[int]) -> float:
    """p-value of the log-rank test that the groups have the event alike.

    NaN where a group is empty or nobody has had it; 1 where all that had it had it at once.
    """
    if len(set(group)) < 2 or not any(happened):
        return math.nan
    try:
        _, p = survdiff(np.asarray(times, dtype=float), np.asarray(happened, dtype=int), np.asarray(group))
    except np.linalg.LinAlgError:  # no time at which it could have gone otherwise
        return 1.0
    return float(p)


def equivalent(difference: Interval, delta: float) -> bool:
    """Whether the whole 95 % interval lies inside ±delta (two one-sided tests at 2.5 %); never for a single pair."""
    return -delta < difference.low and difference.high < delta


def detectable(sd: float, n: int) -> float:
    """The true difference that a paired t test with n seeds finds with 80 % probability, from the spread of the pairs.

    A property of the seeds' noise alone: the observed difference does not enter.  NaN for n < 2, and where there is no
    spread to go by.
    """
    if n < 2 or not 0 < sd < math.inf:
        return math.nan
    return sd * _effect(n)


def seeds_needed(sd: float, delta: float) -> int | None:
    """Seeds with which a true difference of delta is found with 80 % probability, at least 2; None where sd is not
    known, or where a million would not do."""
    if math.isnan(sd) or not delta > 0:
        return None
    effect = delta / sd if sd > 0 else math.inf
    for few in (2, 3):  # the solver does not converge there
        if effect >= _effect(few):
            return few
    if effect < 2.802 / math.sqrt(MOST_SEEDS):  # z(0.975) + z(0.8), what the test tends to
        return None
    return max(2, math.ceil(float(TTestPower().solve_power(effect_size=effect, power=POWER, alpha=1 - CONFIDENCE))))


@functools.lru_cache
def _effect(n: int) -> float:
    """The effect size, in standard deviations, that n pairs find."""
    return float(TTestPower().solve_power(nobs=n, power=POWER, alpha=1 - CONFIDENCE))
