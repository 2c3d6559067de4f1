"""Synthetic sequences that can only be continued by recalling what was seen: numpy, a pure function of the generator.

mqar     Multi-query associative recall, zoology's protocol [Arora 2312.04927]: k1 v1 k2 v2 … then every key once more,
         at gaps drawn from a power law; the label at a repeated key is its value. Everything else is random filler;
         ours leaves the row's keys out, which with the protocol's 8,192 ids hardly matters and with few ids would.
needle   Filler, with one pair somewhere and its key again at the very end.

Keys are ids 1 … vocab/2 - 1, values vocab/2 … vocab - 1. In `needle`, filler is values only.

Axes:  B rows  T tokens of a row  P pairs
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from transformer_vq.config.recall import RecallConfig

IGNORED = -100


class Examples(NamedTuple):
    """tokens (B, T) int64; labels (B, T) int64, IGNORED where nothing is learned; distance (B, T) from what is asked
    back to where it stood, 0 where nothing is asked.
    """

    tokens: np.ndarray
    labels: np.ndarray
    distance: np.ndarray


def make_examples(config: RecallConfig, length: int, rows: int, draw: np.random.Generator) -> Examples:
    """So many rows of the configured task."""
    found = [_TASKS[config.task](config, length, draw) for _ in range(rows)]
    tokens, labels, distance = (np.stack(part) for part in zip(*found, strict=True))
    return Examples(tokens, labels, distance)


def needle_distances(config: RecallConfig, length: int) -> list[int]:
    """Distances from the key to the query, the longest one with the pair at the very beginning."""
    return [round(length * (i + 1) / config.distances) - 1 for i in range(config.distances)]


def _mqar(config: RecallConfig, length: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pairs, half = config.pairs, config.vocab // 2
    keys = draw.choice(np.arange(1, half), size=pairs, replace=False)
    values = draw.choice(np.arange(half, config.vocab), size=pairs, replace=False)
    space = (length - 2 * pairs) // 2
    weight = config.power * np.arange(1, space + 1) ** (config.power - 1.0)
    gaps = draw.choice(space, size=pairs, replace=False, p=weight / weight.sum())
    tokens = draw.choice(np.setdiff1d(np.arange(config.vocab), keys), size=length)
    tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
    places = 2 * pairs + 2 * gaps
    tokens[places] = keys
    labels, distance = np.full(length, IGNORED), np.zeros(length, dtype=np.int64)
    labels[places] = values
    distance[places] = places - 2 * np.arange(pairs)
    return tokens, labels, distance


def _needle(config: RecallConfig, length: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    half = config.vocab // 2
    tokens = draw.integers(half, config.vocab, size=length)
    key, value = draw.integers(1, half), draw.integers(half, config.vocab)
    far = draw.choice(needle_distances(config, length))
    tokens[[length - 1 - far, length - far, length - 1]] = key, value, key
    labels, distance = np.full(length, IGNORED), np.zeros(length, dtype=np.int64)
    labels[-1], distance[-1] = value, far
    return tokens, labels, distance


_TASKS = {"mqar": _mqar, "needle": _needle}
