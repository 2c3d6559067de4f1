"""Where texts end: stop strings across the borders of tokens, against searching the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models_for_evaluation import tiny_model

from transformer_vq.data.tokenizers import ByteTokenizer
from transformer_vq.evaluation import continuations, generate
from transformer_vq.evaluation.stopping import Row

WORDS = [b"a", b"b", b"ab", b"ba", b"aab", b"\xc3", b"\xa9", b""]  # tokens of several bytes, half characters, and none


def decode(ids):
    return b"".join(WORDS[i] for i in ids)


@given(
    st.lists(st.integers(0, len(WORDS) - 1), max_size=20),
    st.lists(st.sampled_from([b"ab", b"aa", b"bab", b"a", "é".encode(), b"bbbb"]), max_size=3, unique=True),
)
def test_a_text_ends_before_the_first_stop_string(tokens, stops):
    row, heard, used = Row([0, 1], stops, (), decode), b"", 0
    for token in tokens:
        row.add(token)
        heard += row.fresh()
        assert not any(stop in heard for stop in stops)
        used += 1
        if row.stop is not None:
            break
    heard += row.rest()
    got, whole = row.continuation(), decode(tokens[:used])
    found = [(whole.find(stop), stop) for stop in stops if stop in whole]
    want = whole[: min(found)[0]] if found else whole
    assert got.text == heard == want
    assert (got.stop is None) == (not found) and (not found or whole.startswith(want + got.stop))
    assert got.tokens == tokens[: len(got.tokens)] and decode(got.tokens).startswith(want)
    assert not found or got.tokens == [] or not decode(got.tokens[:-1]).startswith(want)  # the fewest that hold it


def test_a_stop_token_is_no_part_of_the_text():
    row = Row([], [], {3}, decode)
    for token in (0, 1, 3):
        row.add(token)
    assert (row.continuation().tokens, row.continuation().text, row.stop) == ([0, 1], b"ab", 3)


def test_rows_stop_on_their_own_and_the_others_go_on():
    model, tokenizer = tiny_model(), ByteTokenizer()
    free = generate(model, [[1], [2], [3]], max_tokens=30, seed=5)
    stop = bytes(free[1][4:6])
    heard: list[list[int | None]] = []
    rows = continuations(
        model, [[1], [2], [3]], 30, seed=5, stop=[stop], tokenizer=tokenizer, on_token=heard.append
    )  # fmt: skip
    for row, text in zip(rows, free, strict=True):
        place = bytes(text).find(stop)
        assert row.tokens == (text if place < 0 else text[:place]) and (row.stop == stop) == (place >= 0)
    assert [step[1] for step in heard[:6]] == free[1][:6] and all(step[1] is None for step in heard[6:])
    assert generate(model, [[2]], 30, seed=6, stop_tokens={free[1][4]})[0] == free[1][: free[1].index(free[1][4])]
    steps: list[object] = []
    generate(model, [[2]], 30, seed=6, stop=[stop], tokenizer=tokenizer, on_token=steps.append)
    assert len(steps) == 6  # nothing is read past the end


def test_stops_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="empty"):
        generate(tiny_model(), [[1]], 3, stop=[""], tokenizer=ByteTokenizer())
    with pytest.raises(ValueError, match="tokenizer"):
        generate(tiny_model(), [[1]], 3, stop=["a"])
