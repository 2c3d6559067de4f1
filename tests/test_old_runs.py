"""Run folders written before: they evaluate, generate and resume as they did then. See fixtures/old_runs/make.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from transformer_vq.cli import run

FOLDER = Path(__file__).parent / "fixtures" / "old_runs"
EXPECTED = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
RUNS = ("streams", "windows")
ROUNDING = 1e-4  # another processor sums in another order
SOON = 3  # steps after which other rounding is still below that
TRAINED = 5e-3  # then steps multiply it: the code that wrote them, with one rounding more in a norm, ends 7e-4 away


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The old runs in a folder of their own, which is where their relative paths begin."""
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer(capsys, *arguments: str) -> dict:
    assert run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def assert_holds(got: dict, want: dict, where: str, rel: float = ROUNDING) -> None:
    """Every number of `want` is in `got`; new keys may stand beside them."""
    for key, value in want.items():
        if isinstance(value, dict):
            assert_holds(got[key], value, f"{where}.{key}", rel)
        elif isinstance(value, float):
            assert got[key] == pytest.approx(value, rel=rel), f"{where}.{key}"
        else:
            assert got[key] == value, f"{where}.{key}"


def greedy(capsys, name: str) -> dict:
    return answer(capsys, "generate", name, "--prompt", "12 bottles of", "--temperature", "0", "--tokens", "40")


@pytest.mark.parametrize("name", RUNS)
def test_evaluates_as_before(place, capsys, name):
    got = answer(capsys, "eval", name, "--split", "test", "--context", "full", "--context", "16")
    want = EXPECTED[name]["stopped"]["eval"]
    assert len(got["contexts"]) == len(want["contexts"])
    for mine, theirs in zip(got.pop("contexts"), want["contexts"], strict=True):
        assert_holds(mine, theirs, f"context {theirs['context']}")
    assert_holds(got, {key: value for key, value in want.items() if key != "contexts"}, "eval")


@pytest.mark.parametrize("name", RUNS)
def test_generates_as_before(place, capsys, name):
    assert_holds(greedy(capsys, name)["texts"][0], EXPECTED[name]["stopped"]["generate"]["texts"][0], "text")


@pytest.mark.parametrize("name", RUNS)
def test_resumes_as_before(place, capsys, name):
    want = EXPECTED[name]["finished"]
    summary = answer(capsys, "train", name, "--resume", "--quiet")
    timed = ("run_dir", "checkpoint", "seconds", "tokens_per_s", "device", "versions")
    assert_holds(
        summary, {key: value for key, value in want["summary"].items() if key not in timed}, "summary", TRAINED
    )
    records = [json.loads(line) for line in Path(name, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    new = records[-len(want["records"]) :]
    for i, (mine, theirs) in enumerate(zip(new, want["records"], strict=True)):
        assert_holds(mine, theirs, f"step {theirs['step']}", ROUNDING if i < SOON else TRAINED)
    assert_holds(greedy(capsys, name)["texts"][0], want["generate"]["texts"][0], "text")


def test_a_finished_one_is_not_run_again(place, capsys):
    summary = {**EXPECTED["windows"]["finished"]["summary"], "run_dir": "windows"}
    Path("windows/summary.json").write_text(json.dumps(summary), encoding="utf-8")
    assert answer(capsys, "train", "windows", "--quiet") == summary
