"""`transformer-vq study …` as typed."""

from __future__ import annotations

import json

import pytest

from transformer_vq.cli import run


def test_plan_run_report(write_toy, capsys):
    path = str(write_toy("ste", "rotation", primary={"levels": {"model.quantizer.estimator": "rotation"}}))
    assert run(["study", "plan", path, "--no-trial"]) == 0
    plan = capsys.readouterr().out
    assert "rotation (primary)" in plan and "4, of which 0 are finished" in plan
    assert run(["study", "run", path, "--jobs", "2"]) == 0
    said = capsys.readouterr().out
    assert "[4/4]" in said and "rotation − ste in test bits_per_byte" in said and "report.html" in said
    assert run(["study", "report", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"][0].endswith("report.html")


def test_plan_tells_the_time_by_trial(write_toy, capsys):
    assert run(["study", "plan", str(write_toy("ste")), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["seconds"] > 0 and plan["runs"] == 2


def test_dry_run_and_overrides(write_toy, capsys, tmp_path):
    assert run(["study", "run", str(write_toy("ste")), "seeds=[5]", f"run_dir={tmp_path}/other", "--dry-run"]) == 0
    assert "1, of which 0 are finished" in capsys.readouterr().out and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere.yaml"], "error: nowhere.yaml: no such file"),
        (["STUDY", "factors={}"], "error: factors: an empty grid"),
        (["STUDY", "--jobs", "0"], "error: --jobs = 0: must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(write_toy, capsys, arguments, complaint):
    path = str(write_toy("ste"))
    assert run(["study", "run", *(path if a == "STUDY" else a for a in arguments)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(complaint) and err.count("\n") == 1


def test_more_than_a_thousand_runs_want_consent(write_toy, capsys):
    path = str(write_toy(factors={"train.lr": [float(i) for i in range(1, 502)]}))
    assert run(["study", "run", path, "--dry-run"]) == 2
    assert "1,002 runs, more than 1,000; say --yes" in capsys.readouterr().err
    assert run(["study", "plan", path, "--no-trial", "--yes"]) == 0
