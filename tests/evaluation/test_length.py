"""Bits by position against one pass over each text, and bins that cover every position once."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models_for_evaluation import tiny_model, tiny_split

from transformer_vq.evaluation import length as module
from transformer_vq.evaluation.figures import draw_positions
from transformer_vq.evaluation.length import bins, score_texts
from transformer_vq.evaluation.recurrence import last_seen


@given(st.integers(1, 100_000))
def test_bins_cover_every_position_once(length):
    found = bins(length)
    assert found[0][0] == 0 and found[-1][1] == length
    assert all(a < b for a, b in found) and all(x[1] == y[0] for x, y in itertools.pairwise(found))


@pytest.mark.parametrize("kind", ["vq", "none"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_equals_one_pass_over_each_text(kind, batch_size, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 7)  # so that the state is carried many times
    monkeypatch.setattr(module, "FIRST_BIN", 4)
    model, split, length = tiny_model(kind), tiny_split(100, documents=(0,)), 30
    tokens = torch.from_numpy(split.tokens[:91].astype("int64"))
    with torch.no_grad():
        logits = model(tokens[:90].view(3, length)).logits
    bits = -logits.log_softmax(-1).gather(-1, tokens[1:].view(3, length, 1))[..., 0] / math.log(2)
    found = score_texts(model, split, length, batch_size).by_position()
    assert [(b.start, b.stop) for b in found] == [(0, 4), (4, 6), (6, 8), (8, 11), (11, 16), (16, 23), (23, 30)]
    for b in found:
        per_text = bits[:, b.start : b.stop].mean(1)  # a token is a byte
        assert b.bits_per_byte == pytest.approx(per_text.mean().item(), rel=1e-10)
        assert b.standard_error == pytest.approx(per_text.std().item() / math.sqrt(3), rel=1e-8)


def test_bytes_are_those_under_the_tokens_of_the_bin():
    model, split = tiny_model(), tiny_split(100, documents=(0,))
    covers = np.random.default_rng(5).integers(0, 7, 100)
    found = score_texts(
        model, replace(split, covers=covers.astype(np.uint8), bytes=int(covers.sum())), 30
    ).by_position()
    plain = score_texts(model, split, 30).by_position()
    under = covers[1:91].reshape(3, 30)
    for a, b in zip(found, plain, strict=True):
        bits = b.bits_per_byte * 3 * (b.stop - b.start)
        assert a.bits_per_byte == pytest.approx(bits / under[:, b.start : b.stop].sum(), rel=1e-10)
    with pytest.raises(ValueError, match="without their text"):
        score_texts(model, replace(split, bytes=None), 30).by_position()


def test_only_the_first_texts():
    model, split = tiny_model(), tiny_split(100, documents=(0,))
    one = score_texts(model, split, 20, max_texts=1).by_position()
    assert [b[:3] for b in one] == [b[:3] for b in score_texts(model, split.head(21), 20).by_position()]
    assert all(math.isnan(b.standard_error) for b in one)


def test_recurrences_are_found_within_each_text():
    split, length = tiny_split(100, documents=(0,)), 30
    scores = score_texts(tiny_model(), split, length, batch_size=2)
    found = {group.group: group for group in scores.by_recurrence(2, 4)}
    again = np.stack([last_seen(split.tokens[30 * i : 30 * i + 31], 2) for i in range(3)]) > 0
    assert again.any(1).all() and not again.all()
    assert found["all"].tokens == again.sum()
    bits = (scores.nats * again).sum(1) / math.log(2)
    assert found["all"].bits_per_byte == pytest.approx(bits.sum() / again.sum(), rel=1e-12)
    residual = bits - found["all"].bits_per_byte * again.sum(1)
    assert found["all"].standard_error == pytest.approx(math.sqrt((residual**2).sum() / 6) / again.sum(1).mean())
    assert found["beyond"].tokens == 0 and found["beyond"].bits_per_byte is None  # 16 windows of 4 exceed the text


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"length": 0}, "length = 0: must be at least 1"),
        ({"length": 100}, "length = 100: valid has 100 tokens"),
        ({"length": 5, "max_texts": 0}, "max_texts = 0"),
        ({"length": 5, "batch_size": 0}, "batch_size = 0"),
    ],
)
def test_bad_sizes(keys, says):
    with pytest.raises(ValueError, match=says):
        score_texts(tiny_model(), tiny_split(100), **keys).by_position()


def test_the_picture_has_a_line_a_run_over_growing_positions():
    model, split = tiny_model(), tiny_split(100, documents=(0,))
    results = {"a": score_texts(model, split, 40).by_position(), "b": score_texts(model, split, 40).by_position()}
    axes = draw_positions(results, [10]).axes[0]
    lines = [line for line in axes.lines if line.get_label() in results]
    assert len(lines) == 2 and all(np.all(np.diff(line.get_xdata()) > 0) for line in lines)
    assert [line.get_xdata()[0] for line in axes.lines if line not in lines] == [10]
