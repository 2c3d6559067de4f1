"""Every scored token is where its distance says, and could not be told from the text around it."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_vq.config.recall import RepeatConfig
from transformer_vq.data.repeat import periodic_row, text_row

LETTERS = np.arange(100, 126)
TEXT = np.tile(np.arange(90, dtype=np.uint8), 20)


@settings(deadline=None, max_examples=200)
@given(st.integers(2, 9), st.integers(0, 9), st.integers(0, 40), st.integers(1, 3), st.integers(0, 99), st.data())
def test_what_is_scored_repeats(size, more, gap, most, seed, data):
    cue = data.draw(st.integers(1, size - 1))
    config = RepeatConfig(span=(size, size + more), gap=gap, cue=cue)
    length = data.draw(st.integers(2 * (size + more) + gap - 1, 200))
    tokens, distance = text_row(TEXT, LETTERS, config, length, most, np.random.default_rng(seed))
    assert len(tokens) == len(distance) == length + 1
    scored = np.flatnonzero(distance)
    assert len(scored) and (tokens[scored] == tokens[scored - distance[scored]]).all()
    assert (distance[scored] >= gap + size).all() and np.isin(tokens[scored], LETTERS).all()
    inserted = np.isin(tokens, LETTERS)
    starts = np.flatnonzero(inserted & ~np.insert(inserted[:-1], 0, False))  # gap 0: strings may touch
    assert gap == 0 or 2 <= len(starts) <= most + 1
    away = np.flatnonzero(~inserted)
    assert (np.diff(tokens[away]) % 90 == np.diff(away) % 90).all()  # the rest is one window of the text

    tokens, distance = periodic_row(LETTERS, config, length, np.random.default_rng(seed))
    scored = np.flatnonzero(distance)
    assert len(np.unique(distance[scored])) <= 1 and np.isin(tokens, LETTERS).all()
    assert (tokens[scored] == tokens[scored - distance[scored]]).all()


def test_returns_are_as_many_and_as_far_as_can_be():
    config, draw, counts, distances = RepeatConfig(span=(12, 12), gap=24, cue=4), np.random.default_rng(0), [], []
    for _ in range(400):
        _, distance = text_row(TEXT, LETTERS, config, 127, 3, draw)
        counts.append((distance > 0).sum() // 8)
        distances.append(distance.max())
    assert set(counts) == {1, 2, 3}
    assert min(distances) >= 36 and max(distances) > 100


def test_letters_tell_nothing_about_each_other():
    config, draw = RepeatConfig(span=(16, 16), gap=8, cue=1), np.random.default_rng(1)
    rows = [text_row(TEXT, LETTERS, config, 63, 1, draw)[0] for _ in range(2000)]
    strings = np.stack([row[np.isin(row, LETTERS)][:16] for row in rows]) - 100
    shares = np.bincount(strings.ravel(), minlength=26) / strings.size
    pairs = (strings[:, 1:] == strings[:, :-1]).mean()
    assert abs(shares - 1 / 26).max() < 5e-3 and abs(pairs - 1 / 26) < 5e-3
