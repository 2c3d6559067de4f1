"""Codes as words: what falls into each, how much the token tells of its code, and where the codes lie.

Everything is exact over the text that was read.  Axes:  N tokens  S codes  K key width
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.integer[Any]]


class TopToken(NamedTuple):
    """A token among those of a code."""

    token: int
    times: int
    at: int
    """Place of its middle occurrence under this code."""


def top_tokens(codes: Ints, tokens: Ints, most: int) -> dict[int, list[TopToken]]:
    """codes, tokens (N,) -> by code that occurs, its most frequent tokens, ties by id."""
    order = np.lexsort((np.arange(len(codes)), tokens, codes))
    code, token = codes[order], tokens[order]
    begins = np.flatnonzero(np.r_[True, (code[1:] != code[:-1]) | (token[1:] != token[:-1])])
    counts = np.diff(begins, append=len(order))
    found: dict[int, list[TopToken]] = {}
    for i in np.lexsort((token[begins], -counts, code[begins])):
        begin, count = int(begins[i]), int(counts[i])
        row = found.setdefault(int(code[begin]), [])
        if len(row) < most:
            row.append(TopToken(int(token[begin]), count, int(order[begin + count // 2])))
    return found


def perplexity(counts: Ints) -> float:
    """exp of the entropy of counts (S,)."""
    share = counts[counts > 0] / counts.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def told(codes: Ints, given: Ints | None, size: int) -> float | None:
    """How often a key's code is guessed right from `given` (N,): the share of hits in the second half of the text.

    The guess is the code that `given` had most often in the first half, ties to the lower code, or the most frequent
    code of that half where it did not occur. None for `given`: always the most frequent code.
    None where a half is empty.
    """
    half = len(codes) // 2
    if half == 0:
        return None
    usual = int(np.bincount(codes[:half], minlength=size).argmax())
    guesses = np.full(len(codes) - half, usual)
    if given is not None:
        best: dict[int, int] = {
            code_of: row[0].token for code_of, row in top_tokens(given[:half], codes[:half], most=1).items()
        }
        guesses = np.array([best.get(int(x), usual) for x in given[half:]])
    return float((guesses == codes[half:]).mean())


class Map(NamedTuple):
    """Keys and codes on the two directions in which keys differ most."""

    codes: Floats
    """(S, 2)."""
    keys: Floats
    """(n, 2): those that were kept."""
    explained: tuple[float, float]
    """Share of the keys' variance along each direction."""


def principal_map(gram: Floats, total: Floats, n: int, codebook: Floats, keys: NDArray[np.floating[Any]]) -> Map:
    """Principal components of n keys: gram (K, K) = Σ k kᵀ, total (K,) = Σ k, codebook (S, K), keys (m, K) -> `Map`.

    Signs are such that the largest entry of a direction is positive, so that the same keys give the same map.
    """
    mean = total / n
    values, vectors = np.linalg.eigh(gram / n - np.outer(mean, mean))
    values = values.clip(0)
    axes = np.zeros((len(mean), 2))
    width = min(2, len(mean))
    axes[:, :width] = vectors[:, ::-1][:, :width]
    axes *= np.where(axes[np.abs(axes).argmax(0), [0, 1]] < 0, -1, 1)
    shares = np.r_[values[::-1] / values.sum() if values.sum() > 0 else values, 0.0, 0.0]
    return Map((codebook - mean) @ axes, (keys - mean) @ axes, (float(shares[0]), float(shares[1])))
