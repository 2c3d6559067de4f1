"""Which targets could be known from the past: those whose preceding n tokens have occurred before, by how far back.

On most text most of the next token follows from the last few; what a model keeps of the far past shows on targets at
which the text repeats itself, as an induction head would use it  [Olsson 2209.11895]. They are scored apart, by the
distance of the latest earlier occurrence, counted in the model's windows of exact keys.

Axes: N tokens of a text, P = N - 1 targets, one for each token but the first
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

PREFIX = "recurrence"
"""Of the names of these scores, as in recurrence/beyond/bits_per_byte."""
WINDOWS = (1, 2, 4, 16)
"""Upper ends of the groups, in windows; what is farther back is `beyond`."""


def last_seen(tokens: NDArray[np.integer], n: int, documents: NDArray[np.integer] | None = None) -> NDArray[np.int64]:
    """How far before each target the n tokens that precede it occurred last: 0 where they never did.

    tokens (N,) -> (P,): the entry of target t = 1 … N - 1 is t - t' for the greatest t' < t at which
    tokens[t'-n : t'] equals tokens[t-n : t]. Occurrences may overlap. documents (first positions, increasing): only
    occurrences within the document of the token before the target count, as attention that is reset there sees them.
    Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n = {n}: must be at least 1")
    distance = np.zeros(max(len(tokens) - 1, 0), np.int64)
    runs = len(tokens) - n  # that end before a target: one begins at each of 0 … N - n - 1
    if runs < 2:
        return distance
    _, letters = np.unique(np.asarray(tokens), return_inverse=True)
    names = letters[:runs].astype(np.int64)  # one number for equal runs, made longer by one token at a time
    for k in range(1, n):
        names = _names(names * (letters.max() + 1) + letters[k : k + runs])
    starts = np.arange(runs)
    if documents is not None:
        inside = np.searchsorted(documents, starts, side="right")
        whole = inside == np.searchsorted(documents, starts + n - 1, side="right")
        names = _names(names * (len(documents) + 1) + inside)
        names[~whole] = names.max() + 1 + np.arange((~whole).sum())  # across a border: like nothing else
    order = np.argsort(names, kind="stable")  # equal runs side by side, in the order of the text
    again = np.flatnonzero(names[order[1:]] == names[order[:-1]]) + 1
    distance[order[again] + n - 1] = order[again] - order[again - 1]
    return distance


def group_names() -> list[str]:
    """all, none (of the rest), 1_window, 2_windows, …, beyond."""
    return ["all", "none", *(_within(k) for k in WINDOWS), "beyond"]


def groups(distance: NDArray[np.int64], window: int) -> dict[str, NDArray[np.bool_]]:
    """Masks like `distance`, by `group_names`: `2_windows` holds distances above one window and up to two.

    window: M, in tokens; a model without one is counted in tokens.
    """
    unit = max(window, 1)
    found = {"all": distance > 0, "none": distance == 0}
    below = 0
    for k in WINDOWS:
        found[_within(k)] = (distance > below) & (distance <= k * unit)
        below = k * unit
    return {**found, "beyond": distance > below}


def words(name: str, window: int) -> str:
    """What a group holds, for a reader: `17 to 32 tokens ago`."""
    unit = max(window, 1)
    if name in ("all", "none"):
        return {"all": "ever", "none": "never"}[name]
    if name == "beyond":
        return f"more than {WINDOWS[-1] * unit:,} tokens ago"
    place = [_within(k) for k in WINDOWS].index(name)
    return f"{(WINDOWS[place - 1] * unit if place else 0) + 1:,} to {WINDOWS[place] * unit:,} tokens ago"


def scores_by_recurrence(
    nats: NDArray[np.float64], distance: NDArray[np.int64], covered: NDArray[np.int64] | None, window: int
) -> dict[str, Any]:
    """nats, distance, covered (P,) -> recurrence/GROUP/tokens, and where there are any, …/bits_per_token.

    covered: bytes of the text under each target; given, …/bits_per_byte too, where these are not all 0. A group without
    targets has no bits: no number rather than zero.
    """
    scores: dict[str, Any] = {}
    for name, chosen in groups(distance, window).items():
        tokens, bits = int(chosen.sum()), nats[chosen].sum() / math.log(2)
        scores[f"{PREFIX}/{name}/tokens"] = tokens
        if tokens:
            scores[f"{PREFIX}/{name}/bits_per_token"] = float(bits / tokens)
        if covered is not None and (text := int(covered[chosen].sum())):
            scores[f"{PREFIX}/{name}/bits_per_byte"] = float(bits / text)
    return scores


def _within(windows: int) -> str:
    return f"{windows}_window{'s' if windows > 1 else ''}"


def _names(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Small numbers for equal keys, so that the next product cannot overflow."""
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)
