"""The benchmarks run and say what they promise; what they measure is nobody's test."""

import json

import pytest
import torch

from transformer_vq.bench import generation, train
from transformer_vq.bench.turns import in_turns, ratios
from transformer_vq.cli import run


def test_generation_names_each_position():
    rows = generation.run(positions=(8, 64), repeats=2, compare_up_to=8, layers=1)
    assert [row["position"] for row in rows] == [8, 64]
    assert rows[0]["ratio"] == 1.0 and all(row["milliseconds"] > 0 for row in rows)
    assert rows[0]["llama_ratio"] > 0 and rows[1]["llama_ms"] is None


def test_the_compiled_step_takes_part_where_asked(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    (row,) = train.run(lengths=(24,), repeats=2, tokens=48, layers=1, compiled=True)
    assert len(compiled) == 1 and row["compiled_low"] <= row["compiled"] <= row["compiled_high"]
    assert train.lines([row])["compiled"][0] == (24, *[row["compiled_ms"] / 1e3] * 3)


def test_training_names_each_length_and_moves_both_models():
    (row,) = train.run(lengths=(24,), repeats=2, tokens=48, layers=1)
    assert (row["length"], row["rows"]) == (24, 2)
    assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]


def test_contestants_take_turns_and_the_first_two_do_not_count():
    order: list[str] = []
    found = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, "cpu")
    assert order == ["a", "b"] * 5 and [len(found[name]) for name in "ab"] == [3, 3]
    assert ratios([2.0, 6.0, 4.0], [1.0, 2.0, 1.0]) == (2.5, 3.0, 3.5)
    assert ratios([3.0], [1.0]) == (3.0, 3.0, 3.0)


def test_the_command_prints_one_json_object(capsys, monkeypatch):
    monkeypatch.setattr(generation, "run", lambda repeats: [{"position": repeats, "milliseconds": 1.0, "ratio": 1.0}])
    assert run(["bench", "generation", "--repeats", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bench"] == "generation" and found["rows"][0]["position"] == 3


@pytest.mark.parametrize("arguments", [["bench", "nothing"], ["bench", "attention", "--length", "0"]])
def test_a_wrong_call_is_the_users(arguments, capsys):
    assert run(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
