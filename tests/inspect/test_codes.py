"""Codes as words, compared with counting by hand; the map with a singular value decomposition."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer_vq.data.tokenizers import ByteTokenizer, IdTokenizer
from transformer_vq.inspect.codes import perplexity, principal_map, told, top_tokens
from transformer_vq.inspect.colours import code_colours, themed
from transformer_vq.inspect.numbers import mean_by_code, spread
from transformer_vq.inspect.spelling import Speller, visible

small = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=40)


@given(small, st.integers(1, 4))
def test_the_tokens_of_a_code_are_counted(pairs, most):
    codes, tokens = np.array(pairs).T
    found = top_tokens(codes, tokens, most)
    assert set(found) == set(codes.tolist())
    for code, row in found.items():
        counts = Counter(tokens[codes == code].tolist())
        want = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]
        assert [(t.token, t.times) for t in row] == want
        for t in row:  # the middle one of its occurrences
            places = np.flatnonzero((codes == code) & (tokens == t.token))
            assert t.at == places[len(places) // 2]


@given(small)
def test_what_tells_a_code_is_what_a_dictionary_says(pairs):
    codes, tokens = np.array(pairs).T
    half = len(codes) // 2
    if half == 0:
        assert told(codes, tokens, 4) is None
        return
    usual = max(range(4), key=lambda c: ((codes[:half] == c).sum(), -c))
    hits = alone = 0
    for code, token in zip(codes[half:], tokens[half:], strict=True):
        seen = Counter(codes[:half][tokens[:half] == token].tolist())
        guess = min(seen, key=lambda c: (-seen[c], c)) if seen else usual
        hits += int(guess == code)
        alone += int(usual == code)
    assert told(codes, tokens, 4) == pytest.approx(hits / (len(codes) - half))
    assert told(codes, None, 4) == pytest.approx(alone / (len(codes) - half))


def test_perplexity_of_counts():
    assert perplexity(np.array([5, 5, 0, 5, 5])) == pytest.approx(4) and perplexity(np.array([0, 9])) == 1


def test_the_map_is_that_of_a_singular_value_decomposition():
    keys = np.random.default_rng(0).normal(size=(50, 6)) * [5, 1, 3, 1, 1, 1] + 2
    got = principal_map(keys.T @ keys, keys.sum(0), 50, keys[:7], keys)
    left, sizes, axes = np.linalg.svd(keys - keys.mean(0), full_matrices=False)
    signs = np.sign(axes[[0, 1], np.abs(axes[:2]).argmax(1)])
    np.testing.assert_allclose(got.keys, left[:, :2] * sizes[:2] * signs, atol=1e-9)
    np.testing.assert_allclose(got.codes, got.keys[:7], atol=1e-9)
    np.testing.assert_allclose(got.explained, (sizes**2 / (sizes**2).sum())[:2], rtol=1e-9)


@pytest.mark.parametrize("keys", [np.ones((1, 3)), np.ones((5, 1)), np.zeros((2, 2))], ids=["one", "narrow", "zero"])
def test_the_map_of_hardly_anything(keys):
    got = principal_map(keys.T @ keys, keys.sum(0), len(keys), keys, keys)
    assert np.isfinite(got.codes).all() and got.codes.shape == (len(keys), 2) and got.explained == (0, 0)
    assert len(code_colours(got.codes)) == len(keys)


def test_means_leave_out_what_is_no_number():
    values, codes = np.array([1.0, np.nan, 3.0, 5.0]), np.array([0, 0, 0, 2])
    np.testing.assert_array_equal(mean_by_code(values, codes, 3), [2, np.nan, 5])
    assert spread(values)["mean"] == 3 and spread(values)["p50"] == 3 and spread(values[1:2])["p95"] is None


def test_what_cannot_be_seen_is_written_out():
    assert visible("a b\n\té漢".encode()) == "a␣b⏎⇥é漢" and visible(b"a b\n", spaces=False) == "a b⏎"
    assert visible(b"\xff\x00\x1b") == r"\xff\u{0}\u{1b}"
    assert visible("\u202e".encode()) == r"\u{202e}"  # would turn the line around


@given(st.binary(min_size=1, max_size=60), st.data())
def test_the_text_around_a_token_is_the_text(text, data):
    at = data.draw(st.integers(0, len(text) - 1))
    speller = Speller(ByteTokenizer(), list(text))
    before, own, after = speller.around(at)
    assert own == visible(text[at : at + 1], spaces=False) and len(before) <= 28 and len(after) <= 18
    assert visible(text[max(0, at - 28) : at], spaces=False).endswith(before)
    assert visible(text[at + 1 : at + 19], spaces=False).startswith(after)


def test_ids_without_text_are_their_numbers():
    speller = Speller(IdTokenizer(300), [5, 17, 299])
    assert speller.name(299) == "299" and speller.around(1) == ("5", " 17", " 299")
    assert Speller(ByteTokenizer(3), [0, 100]).name(0) == "<0>"


def test_colours_are_the_themes():
    assert themed("fill: #1f2937; stroke: #000000") == "fill: var(--ink); stroke: var(--ink)"
    colours = code_colours(np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]]))
    assert len(set(colours)) == 4 and all(len(c) == 7 for c in colours)
