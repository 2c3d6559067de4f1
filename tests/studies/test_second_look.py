"""The interval over seeds and pieces, against simulated runs whose variances are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from transformer_vq.evaluation.pieces import Piecewise
from transformer_vq.studies.second_look import second_look


def runs(draw, n, pieces, seeds=0.0, documents=0.0, both=0.0, mean=0.0):
    """Paired runs whose differences vary by seed, by document, and by both at once; documents of all sizes."""
    weight = draw.integers(5, 60, pieces).astype(float)
    shape = (n, pieces)
    reference = draw.normal(2, 0.3, shape) + draw.normal(0, 0.5, (1, pieces))
    difference = mean + draw.normal(0, seeds, (n, 1)) + draw.normal(0, documents, (1, pieces))
    difference = difference + draw.normal(0, both, shape)
    return tuple(
        [Piecewise(row * weight, weight) for row in rows] for rows in (reference + difference, reference)
    )  # fmt: skip


def test_the_mean_is_that_of_the_paired_seeds():
    arm, reference = runs(np.random.default_rng(0), 4, 50, 0.1, 0.1, 0.1)
    value = lambda run: run.total.sum() / run.weight.sum()
    look = second_look(arm, reference)
    assert look.mean == pytest.approx(np.mean([value(a) - value(b) for a, b in zip(arm, reference, strict=True)]))
    assert (look.seeds, look.pieces) == (4, 50) and look == second_look(arm, reference)
    swapped = second_look(reference, arm)
    assert (swapped.low, swapped.high) == pytest.approx((-look.high, -look.low))


def test_what_documents_have_of_their_own_does_not_average_out_over_seeds():
    """One effect per document, the same with every seed: sixteen seeds say no more than four, a t interval says it is
    known exactly."""
    draw = np.random.default_rng(1)
    few, many = (second_look(*runs(draw, n, 100, documents=0.2)) for n in (4, 16))
    expected = 2 * stats.norm.ppf(0.975) * 0.2 / math.sqrt(100)
    for look in (few, many):
        assert look.high - look.low == pytest.approx(expected, rel=0.4)  # a little more: sizes differ


def test_without_them_it_is_the_t_interval_over_seeds():
    arm, reference = runs(np.random.default_rng(2), 5, 200, seeds=0.1)
    look = second_look(arm, reference)
    values = [(a.total - b.total).sum() / a.weight.sum() for a, b in zip(arm, reference, strict=True)]
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert (look.low, look.high) == pytest.approx((low, high), abs=0.1 * (high - low))


@pytest.mark.parametrize("seed", range(5))
def test_it_is_never_narrower_than_the_interval_over_seeds(seed):
    arm, reference = runs(np.random.default_rng(seed), 2, 30, 0.1, 0.1, 0.1)
    look = second_look(arm, reference)
    values = [(a.total - b.total).sum() / a.weight.sum() for a, b in zip(arm, reference, strict=True)]
    low, high = stats.t.interval(0.95, 1, np.mean(values), stats.sem(values))
    assert look.low <= low + 1e-12 and look.high >= high - 1e-12


def test_more_pieces_than_a_thousand_are_taken_together():
    look = second_look(*runs(np.random.default_rng(3), 3, 2500, 0.05, 0.1, 0.1, mean=0.4))
    assert look.pieces == 1000 and look.low < 0.4 < look.high


def test_equal_runs_differ_by_nothing():
    arm, _ = runs(np.random.default_rng(4), 3, 20)
    look = second_look(arm, arm)
    assert (look.mean, look.low, look.high) == (0.0, 0.0, 0.0)


def test_where_there_is_nothing_to_go_by_there_is_no_interval():
    draw = np.random.default_rng(5)
    arm, reference = runs(draw, 3, 20, 0.1)
    assert second_look(arm[:1], reference[:1]) is None
    assert second_look(*runs(draw, 3, 7, 0.1)) is None
    other = [Piecewise(run.total, run.weight + 1) for run in reference]  # another text, or another tokenizer
    assert second_look(arm, other) is None
    assert second_look(arm, [*reference[:2], Piecewise(reference[2].total[:10], reference[2].weight[:10])]) is None
    nan = [Piecewise(run.total * math.nan, run.weight) for run in reference]
    assert second_look(arm, nan) is None
    none = [Piecewise(run.total * 0, run.weight * 0) for run in reference]  # a distance that nobody asked for
    assert second_look(none, none) is None
    with pytest.raises(ValueError, match="3 runs cannot be paired with 2"):
        second_look(arm, reference[:2])


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize(
    ("seeds", "documents", "both"),
    [(0.01, 0, 0.1), (0.01, 0.1, 0.05), (0.04, 0.1, 0.05), (0.002, 0.2, 0.1), (0.01, 0, 0)],
)
def test_it_covers_what_it_says(n, seeds, documents, both):
    """New seeds and new documents in every trial; 400 of them are known to 1.1 %."""
    draw, trials = np.random.default_rng(6), 400
    looks = [second_look(*runs(draw, n, 60, seeds, documents, both, mean=0.3)) for _ in range(trials)]
    assert 0.92 <= np.mean([look.low < 0.3 < look.high for look in looks]) <= 1.0
