"""The learning rate is what the formulas say, at the corners too."""

import math

import pytest

from transformer_vq.config.run import OptimizationConfig
from transformer_vq.training.schedule import learning_rate


def rates(**settings):
    train = OptimizationConfig(lr=2.0, steps=100, **settings)
    return [learning_rate(step, train) for step in range(train.steps)]


def test_warmup_is_linear_and_its_first_step_moves():
    assert rates(warmup=10)[:11] == pytest.approx([0.2 * i for i in range(1, 11)] + [2.0])


def test_cosine_ends_at_the_final_share():
    got = rates(warmup=10, final_lr=0.1)
    assert got[55] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * 0.5)) / 2))
    assert got[99] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * 89 / 90)) / 2))
    assert learning_rate(100, OptimizationConfig(lr=2.0, steps=100, warmup=10)) == pytest.approx(0.2)


def test_wsd_is_flat_then_a_line():
    got = rates(warmup=10, schedule="wsd", decay_share=0.2, final_lr=0.0)
    assert got[10:81] == pytest.approx([2.0] * 71)
    assert got[80:] == pytest.approx([2.0 * (1 - i / 20) for i in range(20)])


def test_constant_stays():
    assert rates(warmup=0, schedule="constant") == [2.0] * 100


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_a_warmup_longer_than_the_run_stays_linear(schedule):
    assert rates(warmup=1000, schedule=schedule) == pytest.approx([2.0 * (i + 1) / 1000 for i in range(100)])
