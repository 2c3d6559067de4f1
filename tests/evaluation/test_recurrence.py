"""Recurrences against a search by hand; scores by group against sums by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models_for_evaluation import tiny_model, tiny_split

from transformer_vq.data import TokenFile
from transformer_vq.data.tokenizers import ByteTokenizer
from transformer_vq.evaluation import evaluate
from transformer_vq.evaluation.recurrence import group_names, groups, last_seen, scores_by_recurrence


def searched(tokens, n, documents=(0,)):
    """The definition: look back from every target."""
    inside = np.searchsorted(documents, np.arange(len(tokens)), side="right")
    found = []
    for t in range(1, len(tokens)):
        far = 0
        for s in range(t - 1, n - 1, -1):
            same = list(tokens[s - n : s]) == list(tokens[t - n : t])
            if t >= n and same and len({*inside[s - n : s], *inside[t - n : t]}) == 1:
                far = t - s
                break
        found.append(far)
    return found


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 8), st.sets(st.integers(1, 59), max_size=4))
def test_recurrences_are_those_that_a_search_finds(tokens, n, borders):
    tokens = np.array(tokens, np.uint8)
    assert last_seen(tokens, n).tolist() == searched(tokens, n)
    documents = np.array([0, *sorted(borders)])
    assert last_seen(tokens, n, documents).tolist() == searched(tokens, n, documents)


def test_large_ids_do_not_overflow():
    rng = np.random.default_rng(0)
    once = rng.integers(0, 2**32, 500, dtype=np.uint64).astype(np.uint32)
    assert last_seen(np.tile(once, 2), 8).tolist() == [0] * 507 + [500] * 492


def test_no_order_below_one():
    with pytest.raises(ValueError, match="n = 0: must be at least 1"):
        last_seen(np.zeros(5, np.uint8), 0)


@given(st.lists(st.integers(0, 200), min_size=1), st.integers(0, 9))
def test_groups_share_out_every_target(distance, window):
    distance = np.array(distance)
    found = groups(distance, window)
    assert list(found) == group_names()
    parts = [mask for name, mask in found.items() if name != "all"]
    assert (np.sum(parts, axis=0) == 1).all()
    assert (found["all"] != found["none"]).all()


def test_groups_end_at_whole_windows():
    found = groups(np.array([0, 1, 10, 11, 20, 21, 40, 41, 160, 161]), 10)
    members = {name: np.flatnonzero(mask).tolist() for name, mask in found.items() if name != "all"}
    assert members == {
        "none": [0], "1_window": [1, 2], "2_windows": [3, 4], "4_windows": [5, 6], "16_windows": [7, 8], "beyond": [9],
    }  # fmt: skip


def test_what_never_recurs_has_no_number():
    scores = scores_by_recurrence(np.ones(3), np.zeros(3, np.int64), np.ones(3, np.int64), 4)
    assert scores["recurrence/all/tokens"] == 0 and "recurrence/all/bits_per_byte" not in scores
    assert scores["recurrence/none/bits_per_byte"] == pytest.approx(1 / math.log(2))


@pytest.mark.parametrize("context", ["full", 8, 1])
@pytest.mark.parametrize("reset", [False, True])
def test_scores_of_a_model_are_sums_over_its_targets(context, reset):
    """Of every context: targets are the same, whatever the windows in which they were read."""
    rng = np.random.default_rng(3)
    letters = rng.integers(97, 100, 90).astype(np.uint8)
    covers = rng.integers(0, 4, 90).astype(np.uint8)
    split = TokenFile("valid", letters, np.array([0, 31, 64]), int(covers.sum()), 0, ByteTokenizer(), covers=covers)
    model = tiny_model()
    plain = evaluate(model, split, context, 3, reset_documents=reset)
    found = evaluate(model, split, context, 3, reset_documents=reset, recurrence=2)
    assert {key: value for key, value in found.items() if not key.startswith("recurrence/")} == plain
    parts = [name for name in group_names() if name != "all"]
    assert sum(found[f"recurrence/{name}/tokens"] for name in parts) == 89
    bits = {
        name: found.get(f"recurrence/{name}/bits_per_token", 0) * found[f"recurrence/{name}/tokens"] for name in parts
    }
    assert sum(bits.values()) == pytest.approx(plain["bits_per_token"] * 89, rel=1e-12)
    if context == "full":
        tokens = torch.from_numpy(letters.astype(np.int64))
        segments = torch.from_numpy(np.searchsorted(split.documents, np.arange(89), side="right"))[None]
        with torch.no_grad():
            logits = model(tokens[None, :-1], segments=segments if reset else None).logits[0]
        each = -logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0].numpy() / math.log(2)
        again = np.array(searched(letters, 2, split.documents if reset else (0,))) > 0
        assert again.any()
        assert found["recurrence/all/bits_per_byte"] == pytest.approx(each[again].sum() / covers[1:][again].sum())


def test_the_orders_that_are_allowed():
    for n in (1, 9):
        with pytest.raises(ValueError, match=f"recurrence = {n}: must be from 2 to 8"):
            evaluate(tiny_model(), tiny_split(), recurrence=n)


def test_tokens_without_text_have_bits_per_token_alone():
    found = evaluate(tiny_model(), replace(tiny_split(), bytes=None, words=0), recurrence=2)
    assert any(key.endswith("all/bits_per_token") for key in found)
    assert not any("bits_per_byte" in key for key in found)
