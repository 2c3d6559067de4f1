"""Synthetic recall sequences: what is asked can be answered, from where it says."""

from __future__ import annotations

import numpy as np
import pytest

from transformer_vq.config import ConfigError, validate
from transformer_vq.config.recall import RecallConfig, RecallRunConfig
from transformer_vq.data.recall import IGNORED, make_examples, needle_distances


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (RecallConfig(vocab=64, pairs=8), 64),
        (RecallConfig(vocab=8, pairs=3), 12),
        (RecallConfig(vocab=8192, pairs=64), 256),
        (RecallConfig(task="needle", vocab=16), 48),
    ],
)
def test_the_answer_follows_the_key_at_the_distance_given(config, length):
    tokens, labels, distance = make_examples(config, length, 50, np.random.default_rng(0))
    assert tokens.shape == labels.shape == (50, length) and tokens.min() >= 0 and tokens.max() < config.vocab
    row, query = np.nonzero(labels != IGNORED)
    assert len(row) == 50 * (config.pairs if config.task == "mqar" else 1)
    key = query - distance[row, query]
    assert (tokens[row, key] == tokens[row, query]).all()
    assert (tokens[row, key + 1] == labels[row, query]).all()
    assert all((tokens[b] == tokens[b, t]).sum() == 2 for b, t in zip(row, query, strict=True))
    assert (distance[row, query] > 1).all() and (labels[row, query] >= config.vocab // 2).all()


def test_needles_lie_at_all_distances_and_are_the_only_key():
    config = RecallConfig(task="needle", vocab=16, distances=4)
    tokens, _, distance = make_examples(config, 64, 200, np.random.default_rng(0))
    assert needle_distances(config, 64) == [15, 31, 47, 63]
    assert set(np.unique(distance[:, -1])) == {15, 31, 47, 63}
    assert ((tokens < 8).sum(1) == 2).all()


def test_queries_come_early_more_often_as_the_power_law_says():
    config = RecallConfig(vocab=256, pairs=1, power=0.01)
    _, labels, _ = make_examples(config, 34, 4000, np.random.default_rng(0))
    first = (np.nonzero(labels != IGNORED)[1] == 2).mean()
    weight = np.arange(1, 17) ** -0.99
    assert first == pytest.approx(weight[0] / weight.sum(), abs=0.03)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"recall": {"pairs": 40, "vocab": 64}}, r"recall.pairs = 40: at most 31 fit"),
        ({"recall": {"task": "needle", "distances": 400}}, r"recall.distances = 400: at most 255"),
        ({"model": {"vocab_size": 10}}, r"model.vocab_size = 10: is recall.vocab"),
        ({"eval": {"recurrence": 4}}, r"eval.recurrence: is for text"),
    ],
)
def test_complaints(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        validate(settings, RecallRunConfig)
