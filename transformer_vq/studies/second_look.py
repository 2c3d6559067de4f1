"""A paired difference with the chance of the test split in it too: a bootstrap over seeds and pieces.

A t interval over seeds speaks for other seeds on these very documents. Here the pieces of the split (documents, windows
or examples, see evaluation/pieces.py) are a sample as well. Every seed is scored on the same ones, so seeds and pieces
are crossed, not nested: a resample draws seeds and, once for all of them, pieces [Owen 2007, the pigeonhole bootstrap].
To draw pieces anew within each seed would let what a document has of its own average out over seeds, which it does not.

With D_sp = Σ over a piece of arm − reference, and w_p its weight, a resample with multiplicities u and v has

    difference = Σ_s u_s Σ_p v_p D_sp / (n Σ_p v_p w_p)

From the resamples comes a variance. Of few seeds a bootstrap sees (n−1)/n of the variance between them: that part is
exchanged for the unbiased s²/n, and the interval takes t with the degrees of freedom of the two parts together, n−1
and P−1 [Satterthwaite 1946], but is never narrower than the t interval over seeds, as it might be with two or three.
Percentiles of four seeds would cover far less than they say.

Axes:  n seeds  P pieces  R resamples
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from transformer_vq.evaluation.pieces import Floats, Piecewise
from transformer_vq.studies.statistics import CONFIDENCE

RESAMPLES, AT_ONCE = 2000, 100
FEWEST, MOST = 8, 1000  # pieces that are a sample; of more, neighbours are taken together


@dataclass(frozen=True)
class SecondLook:
    """A mean difference and its 95 % interval over seeds and pieces."""

    mean: float
    low: float
    high: float
    seeds: int
    pieces: int


def second_look(arm: Sequence[Piecewise], reference: Sequence[Piecewise]) -> SecondLook | None:
    """Arm minus reference, pair by pair (one pair a seed).

    None for fewer than two seeds or `FEWEST` pieces, and where not all were scored on the same pieces.
    Raises ValueError when the lengths differ.
    """
    if len(arm) != len(reference):
        raise ValueError(f"{len(arm)} runs cannot be paired with {len(reference)}")
    runs = [*arm, *reference]
    if len(arm) < 2 or not len(runs[0].weight) or any(not np.array_equal(run.weight, runs[0].weight) for run in runs):
        return None
    groups = np.linspace(0, len(runs[0].weight), min(MOST, len(runs[0].weight)), endpoint=False, dtype=np.int64)
    weight = np.add.reduceat(runs[0].weight, groups)
    totals = np.stack([a.total - b.total for a, b in zip(arm, reference, strict=True)])
    difference = np.add.reduceat(totals, groups, axis=1)
    n, pieces = difference.shape
    if pieces < FEWEST or not weight.sum() > 0 or not np.isfinite(difference).all():
        return None
    by_seed = difference.sum(1) / weight.sum()
    mean, of_seeds = float(by_seed.mean()), float(by_seed.var(ddof=1)) / n
    spread = float(np.var(_resamples(difference, weight)))
    of_pieces = max(0.0, spread - of_seeds * (n - 1) / n)
    half = 0.0
    if (variance := of_seeds + of_pieces) > 0:
        freedom = variance**2 / (of_seeds**2 / (n - 1) + of_pieces**2 / (pieces - 1))
        both, alone = stats.t.ppf((1 + CONFIDENCE) / 2, [freedom, n - 1]) * np.sqrt([variance, of_seeds])
        half = float(max(both, alone))
    return SecondLook(mean, mean - half, mean + half, n, pieces)


def _resamples(difference: Floats, weight: Floats) -> Floats:
    """(R): mean differences of seeds and pieces drawn with replacement; the same draws in every call."""
    draw, (n, pieces) = np.random.default_rng(0), difference.shape
    found = []
    for _ in range(RESAMPLES // AT_ONCE):
        u = draw.multinomial(n, np.full(n, 1 / n), AT_ONCE)
        v = draw.multinomial(pieces, np.full(pieces, 1 / pieces), AT_ONCE)
        weighed = v @ weight
        found.append(((u @ difference) * v).sum(1)[weighed > 0] / (n * weighed[weighed > 0]))
    return np.concatenate(found)
