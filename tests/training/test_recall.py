"""The recall task in the training loop."""

from __future__ import annotations

import math

import pytest
import torch

from transformer_vq.config import validate
from transformer_vq.config.recall import RecallRunConfig
from transformer_vq.training.recall import RecallTask, run


def settings(tmp_path, **changes):
    tree = {
        "run_dir": str(tmp_path / "run"),
        "recall": {"vocab": 16, "pairs": 2, "examples": 32},
        "model": {"layers": 1, "width": 32, "key_dim": 16, "value_dim": 32, "window": 4, "quantizer": {"codes": 8}},
        "train": {"steps": 3, "batch_size": 4, "seq_len": 12, "warmup": 1},
        **changes,
    }
    return validate(tree, RecallRunConfig)


@pytest.mark.parametrize("recall", [{"vocab": 16, "pairs": 2}, {"task": "needle", "vocab": 16, "distances": 3}])
def test_a_run_reports_accuracy_by_distance(tmp_path, recall):
    test = run(settings(tmp_path, recall={**recall, "examples": 32}), quiet=True)["test"]
    assert 0 <= test["accuracy"] <= 1 and math.isfinite(test["loss"])
    by_distance = {key for key in test if key.startswith("distance")}
    assert by_distance and ("task" not in recall or by_distance == {f"distance{n}/accuracy" for n in (3, 7, 11)})
    assert test["questions"] == 32 * recall.get("pairs", 1) and "layer0/usage" in test


def test_rows_do_not_depend_on_how_they_are_split(tmp_path):
    task = RecallTask(settings(tmp_path), torch.device("cpu"))
    whole, part = task.batch(5, range(4), 0).inputs, task.batch(5, range(2, 4), 0).inputs
    assert torch.equal(whole[0][2:], part[0]) and torch.equal(whole[1][2:], part[1])
    assert not torch.equal(whole[0], task.batch(6, range(4), 0).inputs[0])


def test_accuracy_of_a_model_that_knows(tmp_path, monkeypatch):
    """A model that looks the answer up gets everything right; one that is wrong everywhere, nothing."""
    task = RecallTask(settings(tmp_path), torch.device("cpu"))

    class Knows(torch.nn.Module):
        layers = ()
        offset = 0

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens):
            answers = torch.zeros_like(tokens)
            for b, row in enumerate(tokens.tolist()):
                for t, token in enumerate(row):
                    if token in row[:t]:
                        answers[b, t] = row[row.index(token) + 1]
            logits = torch.nn.functional.one_hot((answers + self.offset) % 16, 16).float()
            return type("Output", (), {"logits": logits})

    task.model = Knows()
    assert task.evaluate("test", final=True)["accuracy"] == 1.0
    task.model.offset = 1
    assert task.evaluate("test", final=True)["accuracy"] == 0.0
