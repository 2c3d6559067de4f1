"""The recall task in the training loop."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from transformer_vq.cli import run as command
from transformer_vq.config import ConfigError, validate
from transformer_vq.config.recall import RecallRunConfig
from transformer_vq.training import load_run
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
    needle = {f"distance{n}/{name}" for n in (3, 7, 11) for name in ("accuracy", "bits")}
    assert by_distance and ("task" not in recall or by_distance == needle)
    assert test["questions"] == 32 * recall.get("pairs", 1) and "layer0/usage" in test


TEXT = "".join(f"line {i} of {i * i % 97} things\n" for i in range(400))


def repeat_settings(tmp_path, **changes):
    (tmp_path / "text").write_text(TEXT)
    tree = {
        "recall": {"task": "repeat", "examples": 16, "repeat": {"span": [6, 9], "gap": 10, "cue": 2}},
        "data": {"source": str(tmp_path / "text"), "cache": str(tmp_path / "cache")},
        "train": {"steps": 3, "batch_size": 4, "seq_len": 40, "warmup": 1},
    }
    return settings(tmp_path, **{**tree, **changes})


def test_a_repeat_run_scores_the_returns_by_distance_and_the_rest_apart(tmp_path):
    summary = run(repeat_settings(tmp_path), quiet=True)
    test = summary["test"]
    assert 16 * 4 <= test["questions"] <= 16 * 7 and {"distance16/bits", "distance16/accuracy"} <= test.keys()
    assert test["bits"] == pytest.approx(test["loss"] / math.log(2)) and 0 < test["other_bits"] < 20
    assert (tmp_path / "run" / "tokenizer.json").is_file()
    assert run(repeat_settings(tmp_path), quiet=True) == summary  # finished


def test_a_repeat_run_is_used_as_a_language_model(tmp_path, capsys):
    done = repeat_settings(tmp_path)
    run(done, quiet=True)
    assert command(["eval", done.run_dir, "--split", "test", "--json"]) == 0
    (scored,) = json.loads(capsys.readouterr().out)["contexts"]
    assert scored["bytes"] > 100 and 0 < scored["bits_per_byte"] < 20
    assert command(["generate", done.run_dir, "--prompt", "line", "--tokens", "4"]) == 0
    loaded = load_run(done.run_dir)
    assert loaded.config.data == done.data and loaded.model.config.vocab_size == 256


def test_a_recall_run_without_text_is_no_language_model(tmp_path, capsys):
    done = settings(tmp_path)
    run(done, quiet=True)
    assert command(["generate", done.run_dir]) == 2
    assert f"{done.run_dir}: its tokens are no text (recall.task: mqar)" in " ".join(capsys.readouterr().err.split())


def test_training_has_several_returns_and_periods_and_tests_have_one(tmp_path):
    task = RecallTask(repeat_settings(tmp_path), torch.device("cpu"))
    examples = task._examples(64, "test", 1)
    assert all(len(set(row[row > 0])) == 1 and (row > 0).sum() <= 7 for row in examples.distance)
    assert (examples.labels[:, :-1] == examples.tokens[:, 1:]).all()  # everything is learned
    train = task._examples(64, "train", 1).distance
    assert any(len(set(row[row > 0])) > 1 for row in train) and any((row > 0).sum() > 21 for row in train)
    counts = task.batch(0, range(4), 0).counts
    assert counts == {"lm": 4 * 40, "quantizers": 4 * 40}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "task: repeat reads a text"),
        ({"recall": {"task": "mqar", "vocab": 16, "pairs": 2}}, "task: mqar reads no text"),
        ({"recall": {"task": "repeat", "repeat": {"span": [15, 18], "gap": 10}}}, "train.seq_len = 40: too short.* 45"),
        ({"recall": {"task": "repeat", "repeat": {"span": [4, 9]}}}, r"recall.repeat.span = \[4, 9\]: .* cue = 4"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        repeat_settings(tmp_path, **changes)


def test_a_text_that_is_too_short_is_refused_before_training(tmp_path):
    config = repeat_settings(tmp_path, train={"steps": 3, "seq_len": 600})
    with pytest.raises(ConfigError, match=r"valid.* tokens; at least 601"):
        RecallTask(config, torch.device("cpu"))


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


@pytest.mark.parametrize("recall", [{"vocab": 16, "pairs": 2}, {"task": "needle", "vocab": 16, "distances": 3}])
def test_the_finished_model_is_tested_at_other_lengths(tmp_path, recall):
    """The length of training is the same as without; the others are longer sequences with as many questions."""
    sizes = {"examples": 32, "eval_lengths": [12, 48, 96]}
    evaluation = {"every": 2, "batch_size": 7}
    got = run(settings(tmp_path, recall={**recall, **sizes}, eval=evaluation), quiet=True)
    plain = run(settings(tmp_path / "plain", recall={**recall, "examples": 32}, eval=evaluation), quiet=True)
    for split in ("valid", "test"):
        assert {key: value for key, value in got[split].items() if not key.startswith("length")} == plain[split]
        for key, value in plain[split].items():
            if not key.startswith("layer"):
                assert got[split][f"length12/{key}"] == value
        for length in (48, 96):
            assert got[split][f"length{length}/questions"] == plain[split]["questions"]
            assert 0 <= got[split][f"length{length}/accuracy"] <= 1
            farthest = f"length{length}/distance{length - 1}/bits"  # needle: from the very beginning
            assert "task" not in recall or farthest in got[split]
    during = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][1]
    assert (during["split"], during["step"]) == ("valid", 2) and not any(key.startswith("length") for key in during)


def test_longer_sequences_are_answered_as_what_they_are(tmp_path, monkeypatch):
    """A model that knows the first half of every longer sequence only: what it says counts there, and by distance."""
    config = settings(
        tmp_path, recall={"task": "needle", "vocab": 16, "distances": 4, "examples": 64, "eval_lengths": [32]}
    )
    task = RecallTask(config, torch.device("cpu"))

    def near(tokens, **_):
        """Answers what follows the key when that is at most 16 tokens back, else token 0."""
        logits = torch.zeros(*tokens.shape, 16)
        for row, place in zip(tokens, logits, strict=True):
            before = [i for i in range(len(row) - 1) if row[i] == row[-1]]
            if len(row) - 1 - before[-1] <= 16:
                place[-1, row[before[-1] + 1]] = 9.0
        return SimpleNamespace(logits=logits)

    monkeypatch.setattr(task.model, "forward", near)
    found = task.evaluate("test", final=True)
    assert found["accuracy"] == 1.0
    assert {n: found[f"length32/distance{n}/accuracy"] for n in (7, 15, 23, 31)} == {7: 1.0, 15: 1.0, 23: 0.0, 31: 0.0}
    assert 0.3 < found["length32/accuracy"] < 0.7
    assert not any(key.startswith("length") for key in task.evaluate("test", final=False))


@pytest.mark.parametrize(
    ("recall", "message"),
    [
        (
            {"pairs": 3, "eval_lengths": [24, 11]},
            r"recall\.pairs = 3: at most 2 fit vocab 128, recall\.eval_lengths = 11",
        ),
        ({"task": "needle", "distances": 5, "eval_lengths": [8]}, r"at most 3 fit recall\.eval_lengths = 8"),
        ({"eval_lengths": [0]}, r"recall\.eval_lengths.* at least 1"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(tmp_path, recall, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, recall=recall)
