"""The benchmarks run and say what they promise; what they measure is nobody's test."""

import json

import pytest

from transformer_vq.bench import generation
from transformer_vq.cli import run


def test_generation_names_each_position():
    rows = generation.run(positions=(8, 64), layers=1, width=32, repeats=2)
    assert [row["position"] for row in rows] == [8, 64]
    assert rows[0]["ratio"] == 1.0 and all(row["milliseconds"] > 0 for row in rows)


def test_the_command_prints_one_json_object(capsys, monkeypatch):
    monkeypatch.setattr(generation, "run", lambda repeats: [{"position": repeats, "milliseconds": 1.0, "ratio": 1.0}])
    assert run(["bench", "generation", "--repeats", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bench"] == "generation" and found["rows"][0]["position"] == 3


@pytest.mark.parametrize("arguments", [["bench", "nothing"], ["bench", "attention", "--length", "0"]])
def test_a_wrong_call_is_the_users(arguments, capsys):
    assert run(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
