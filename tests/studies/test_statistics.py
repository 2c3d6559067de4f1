"""Statistics against textbook numbers and hand-computed values."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_vq.studies.statistics import (
    Interval,
    detectable,
    equivalent,
    holm,
    mean_interval,
    paired,
    seeds_needed,
)

# Student's own data (1908), hours of sleep gained with two drugs by the same ten patients:
# mean difference 1.58, sd 1.229995, t = 4.0621 on 9 degrees of freedom, p = 0.002833, interval [0.7001142, 2.4598858].
SLEEP_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SLEEP_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_paired_difference_of_students_sleep_data():
    d = paired(SLEEP_2, SLEEP_1)
    assert d.n == 10
    assert d.mean == pytest.approx(1.58)
    assert d.sd == pytest.approx(1.229995, abs=1e-6)
    assert d.p == pytest.approx(0.002833, abs=1e-6)
    assert (d.low, d.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)


def test_mean_interval_by_hand():
    """1, 2, 3: mean 2, sd 1, t(0.975, 2) = 4.302653, half-width 4.302653/√3 = 2.484138."""
    interval = mean_interval([1.0, 2.0, 3.0])
    assert (interval.mean, interval.sd, interval.n) == (2.0, 1.0, 3)
    assert interval.low == pytest.approx(2 - 2.484138, abs=1e-6)
    assert interval.high == pytest.approx(2 + 2.484138, abs=1e-6)


def test_one_seed_has_no_interval_and_none_has_no_mean():
    one, none = mean_interval([1.5]), mean_interval([])
    assert one.mean == 1.5 and math.isnan(one.low) and math.isnan(one.sd) and one.n == 1
    assert math.isnan(none.mean) and none.n == 0
    assert math.isnan(paired([1.0], [2.0]).p)


def test_pairs_without_spread():
    same = paired([1.0, 2.0], [1.0, 2.0])
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    shifted = paired([2.0, 3.0], [1.0, 2.0])
    assert shifted.mean == 1 and math.isnan(shifted.p)


@pytest.mark.parametrize("size", [1e-30, 1.0, 123456.7, 1e30])
@pytest.mark.parametrize("constant", [0.01, 1e-7])
def test_a_constant_difference_has_no_p_value_whatever_rounding_makes_of_it(size, constant):
    column = [size * (1 + 0.371 * i) for i in range(6)]
    d = paired([x + constant * size for x in column], column)
    assert math.isnan(d.p) and d.sd == 0 and d.low == d.high == d.mean == pytest.approx(constant * size, rel=1e-6)
    assert math.isnan(detectable(d.sd, d.n))


def test_columns_in_fp32_are_known_to_fp32():
    column = np.random.default_rng(0).normal(2, 0.1, 8).astype(np.float32)
    assert math.isnan(paired((column + np.float32(0.01)).tolist(), column.tolist()).p)
    assert math.isnan(paired(column + np.float32(0.01), column).p)
    assert paired([1.0, 2.0, 3.0], [0.5, 1.75, 2.0]).p < 1  # short fractions say nothing about where they come from


def test_the_same_twice_to_rounding_is_no_difference():
    d = paired([0.1 + 0.2] * 3, [0.3] * 3)
    assert d.p == 1 and d.sd == 0 and equivalent(d, 1e-9)


def test_a_spread_just_above_rounding_counts():
    column = np.linspace(1, 2, 8)
    noise = np.random.default_rng(1).normal(0, 1e-12, 8)
    assert paired(column + 0.01 + noise, column).p < 1e-20


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), max_size=6),
    st.sampled_from([2.0**-1000, 2.0**-60, 1.0, 2.0**60, 2.0**1000]),
)
def test_statistics_follow_the_unit(pairs, unit):
    """Whatever the numbers are measured in: nothing overflows, vanishes or warns."""
    a, b = ([pair[i] for pair in pairs] for i in (0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, scaled = paired(a, b), paired([x * unit for x in a], [x * unit for x in b])
    if all(x == 0 or abs(x) > 1e-3 for x in (*a, *b)):
        assert scaled.p == pytest.approx(plain.p, rel=1e-6, nan_ok=True)
        assert scaled.mean == pytest.approx(plain.mean * unit, nan_ok=True) and scaled.n == plain.n == len(pairs)
    assert math.isnan(plain.p) or 0 <= plain.p <= 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_mean(bad):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for found in (
            mean_interval([1.0, bad]),
            mean_interval([bad]),
            paired([1.0, bad], [1.0, 2.0]),
            paired([bad], [1]),
        ):
            assert math.isnan(found.mean) and math.isnan(found.low) and not equivalent(found, 1.0)
        assert math.isnan(detectable(bad, 5)) and math.isnan(holm([bad])[0]) == math.isnan(bad)


def test_unequal_lengths_cannot_be_paired():
    with pytest.raises(ValueError, match="3 values cannot be paired with 2"):
        paired([1.0, 2.0, 3.0], [1.0, 2.0])


def test_holm_by_hand():
    """Sorted .01 .02 .03 .04 times 4 3 2 1, then never below the one before: .04 .06 .06 .06."""
    assert holm([0.01, 0.04, 0.03, 0.02]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.5, math.nan, 0.01])[::2] == pytest.approx([0.5, 0.02])
    assert math.isnan(holm([0.5, math.nan])[1]) and holm([]) == []


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-0.5, 0.9, True), (-1.0, 0.5, False), (-0.5, 1.1, False), (1.1, 1.2, False), (math.nan, math.nan, False)],
)
def test_equivalence_needs_the_whole_interval_inside(low, high, verdict):
    assert equivalent(Interval(0.0, low, high, 1.0, 5), delta=1.0) is verdict


def test_detectable_difference_is_the_one_found_four_times_in_five():
    """By simulation: 8 pairs, spread 0.3, a true difference of the size claimed."""
    size = detectable(sd=0.3, n=8)
    samples = np.random.default_rng(0).normal(size, 0.3, (20000, 8))
    t = samples.mean(1) / (samples.std(1, ddof=1) / np.sqrt(8))
    assert (abs(t) > 2.364624).mean() == pytest.approx(0.8, abs=0.01)  # t(0.975, 7)


def test_detectable_difference_does_not_know_the_observed_one():
    near, far = paired([1.0, 2.0, 3.5], [1.0, 1.0, 1.0]), paired([101.0, 102.0, 103.5], [1.0, 1.0, 1.0])
    assert detectable(near.sd, near.n) == pytest.approx(detectable(far.sd, far.n))
    assert math.isnan(detectable(0.3, 1))


def test_seeds_needed():
    """Cohen's d = 0.5, two-sided 5 %, 80 %: 34 pairs (G*Power's manual and every textbook table)."""
    assert seeds_needed(sd=1.0, delta=0.5) == 34
    assert seeds_needed(sd=0.0, delta=0.5) == 2
    assert seeds_needed(sd=math.nan, delta=0.5) is None and seeds_needed(sd=1.0, delta=1e-9) is None


@pytest.mark.parametrize("delta", [0.01, 0.5, 2.9, 3.0, 3.5, 8.0, 11.5, 11.6, 21.0, 1e300, math.inf])
def test_seeds_needed_find_the_difference_and_one_less_do_not(delta):
    n = seeds_needed(1.0, delta)  # the solver's own precision is 4 digits
    assert detectable(1.0, n) <= delta * 1.001
    assert n == 2 or detectable(1.0, n - 1) > delta * 0.999


def test_power_by_hand():
    assert seeds_needed(sd=1.0, delta=0.5) == 34
    assert detectable(sd=1.0, n=34) <= 0.5
