"""Early stopping: when, and the same after a resume."""

import json
from pathlib import Path

import pytest
from toy_task import ToyTask, interrupt_at, records, toy_config, train_toy

from transformer_vq.config import ConfigError
from transformer_vq.training import TrainingInterrupted
from transformer_vq.training.early_stop import Patience


@pytest.mark.parametrize(
    ("values", "patience", "ends"),
    [
        ([3, 2, 1, 1, 1], 2, 4),  # as good is not better
        ([3, 2, 2.5, 1.9, 2, 2, 2], 3, 6),
        ([3, 2, 1], 1, None),
        ([3, float("nan"), None, float("inf")], 3, 3),  # no number is no improvement
        ([None, None, 5, 6], 2, 1),
        ([1, 2, 3, 4], None, None),
    ],
)
def test_patience(values, patience, ends):
    spent = Patience(patience)
    stopped = []
    for step, value in enumerate(values, start=1):
        spent.add(step, value)
        spent.add(step, 0.0)  # once a step
        stopped.append(spent.spent)
    first = stopped.index(True) if True in stopped else None
    assert first == ends


@pytest.fixture
def scores(monkeypatch):
    """Step -> valid score, best at 8; the final evaluation of the same step is the same."""
    by_step = {4: 3.0, 8: 1.0, 12: 2.0, 16: 1.5, 20: 4.0, 24: 0.5}

    def evaluate(self, split, final):
        return {"mse": by_step[records(Path(self.config.run_dir))[-1]["step"]]}

    monkeypatch.setattr(ToyTask, "evaluate", evaluate)
    return {"steps": 24, "patience": 2, "eval": {"every": 4}, "checkpoint": {"every": None}}


def test_it_stops_evaluates_and_says_so(tmp_path, scores):
    config, tasks = toy_config(tmp_path / "run", **scores), []
    summary = train_toy(config, tasks)
    assert summary["steps"] == 16 and summary["valid"] == {"mse": 1.5}
    assert summary["early_stop"] == {"step": 16, "best_step": 8, "patience": 2}
    assert summary["best"] == {"step": 8, "mse": 1.0}
    assert summary["checkpoint"].endswith("step-00000016")
    assert train_toy(config, tasks) == summary == train_toy(config, tasks, resume=True)
    assert len(tasks) == 1
    with pytest.raises(ConfigError, match=r"train\.steps = 50: the run in .* stopped early, after step 16, by"):
        train_toy(toy_config(tmp_path / "run", **scores | {"steps": 50}), resume=True)


@pytest.mark.parametrize("at", [7, 8, 13, 15])
def test_the_count_outlives_a_resume(tmp_path, monkeypatch, scores, at):
    train_toy(toy_config(tmp_path / "straight", **scores))
    with monkeypatch.context() as patched:
        interrupt_at(patched, at)
        with pytest.raises(TrainingInterrupted):
            train_toy(toy_config(tmp_path / "run", **scores))
    summary = train_toy(toy_config(tmp_path / "run", **scores), resume=True)
    assert summary["early_stop"] == {"step": 16, "best_step": 8, "patience": 2}
    assert records(tmp_path / "run") == records(tmp_path / "straight")


def test_it_is_off_by_default_and_needs_evaluations(tmp_path, scores):
    summary = train_toy(toy_config(tmp_path / "run", **scores | {"patience": None}))
    assert summary["steps"] == 24 and "early_stop" not in summary
    with pytest.raises(ConfigError, match=r"train\.patience = 2: counts evaluations; eval\.every = null makes none"):
        train_toy(toy_config(tmp_path / "other", **scores | {"eval": {"every": None}}))
    assert not (tmp_path / "other").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 24
