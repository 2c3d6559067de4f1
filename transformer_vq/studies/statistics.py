"""Statistics over seeds: intervals, paired differences, Holm, equivalence, power; from scipy and statsmodels.

Runs of two arms with the same seed see the same batches in the same order, so differences are taken within a seed; the
spread between seeds that both arms share drops out. Intervals are 95 % and uncorrected; p-values of exploratory
comparisons are corrected by Holm's method, the primary comparison's is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

CONFIDENCE, POWER = 0.95, 0.8


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
    """Mean and t interval of values over seeds."""
    x = np.asarray(values, dtype=float)
    if x.size < 2:
        return Interval(float(x.mean()) if x.size else math.nan, math.nan, math.nan, math.nan, x.size)
    mean, sd = float(x.mean()), float(x.std(ddof=1))
    if sd <= 1e-12 * np.abs(x).max():  # no spread but that of rounding
        return Interval(mean, mean, mean, 0.0, x.size)
    low, high = stats.t.interval(CONFIDENCE, x.size - 1, loc=mean, scale=stats.sem(x))
    return Interval(mean, float(low), float(high), sd, x.size)


def paired(arm: Sequence[float], reference: Sequence[float]) -> Paired:
    """Arm minus reference, pair by pair (one pair a seed).

    Differences that are all exactly equal have no spread to test against: p is 1 where they are zero (one configuration
    twice), else NaN.  Raises ValueError when the lengths differ.
    """
    if len(arm) != len(reference):
        raise ValueError(f"{len(arm)} values cannot be paired with {len(reference)}")
    difference = np.subtract(arm, reference)
    interval = mean_interval(difference.tolist())
    if interval.n < 2 or interval.sd == 0:
        p = 1.0 if interval.n > 1 and interval.mean == 0 else math.nan
    else:
        p = float(stats.ttest_rel(arm, reference).pvalue)
    return Paired(interval.mean, interval.low, interval.high, interval.sd, interval.n, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected by Holm's step-down method; NaN stays NaN and does not count."""
    corrected = np.asarray(p_values, dtype=float).copy()
    known = ~np.isnan(corrected)
    if known.any():
        corrected[known] = multipletests(corrected[known], method="holm")[1]
    return corrected.tolist()


def equivalent(difference: Interval, delta: float) -> bool:
    """Whether the whole 95 % interval lies inside ±delta (two one-sided tests at 2.5 %); never for a single pair."""
    return -delta < difference.low and difference.high < delta


def detectable(sd: float, n: int) -> float:
    """The true difference that a paired t test with n seeds finds with 80 % probability, from the spread of the pairs.

    A property of the seeds' noise alone: the observed difference does not enter.  NaN for n < 2.
    """
    if n < 2 or math.isnan(sd):
        return math.nan
    return sd * float(TTestPower().solve_power(nobs=n, power=POWER, alpha=1 - CONFIDENCE))


def seeds_needed(sd: float, delta: float) -> int:
    """Seeds with which a true difference of delta is found with 80 % probability, at least 2."""
    effect = delta / sd if sd > 0 else math.inf
    if effect > 20:  # two seeds suffice, and the solver does not converge there
        return 2
    return max(2, math.ceil(float(TTestPower().solve_power(effect_size=effect, power=POWER, alpha=1 - CONFIDENCE))))
