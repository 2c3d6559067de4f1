"""A gate lets the other arms run, or ends the study and says so."""

from __future__ import annotations

import json

import pytest

from transformer_vq.cli import run
from transformer_vq.config import ConfigError
from transformer_vq.studies.gate import judge
from transformer_vq.studies.plan import load_study
from transformer_vq.studies.results import collect
from transformer_vq.studies.run import run_study, state_of
from transformer_vq.studies.words import verdict

HOLDS = {"gate": {"better": "rotation", "than": "ste", "by": 0.01}}  # rotation is better by 0.05, see toy_runs
FAILS = {"gate": {"better": "rotation", "than": "ste", "by": 0.5}}


def test_arms_run_behind_a_gate_that_holds(write_toy):
    study, said = load_study(write_toy("ste", "rotation", "scale", **HOLDS)), []
    assert run_study(study, say=said.append) == {"done": 6}
    assert [line.partition(":")[0] for line in said if not line.startswith("[")] == ["gate", "Gate", "runs"]
    found = judge(study)
    assert found.held and found.gain.mean == pytest.approx(0.05, abs=0.03) and found.gain.n == 2
    assert "holds, it is by +0.0" in verdict(collect(study))[0]


def test_a_study_ends_at_a_gate_that_does_not_hold(write_toy, capsys):
    path = write_toy("ste", "rotation", "scale", primary={"levels": {"model.quantizer.estimator": "scale"}}, **FAILS)
    assert run(["study", "run", str(path)]) == 0
    out = capsys.readouterr().out
    assert "does not hold" in out and "its other arms were not run" in out and "paired seeds make" not in out
    study = load_study(path)
    assert {run_.arm for run_ in study.final_runs({}) if state_of(run_) == "done"} == {"ste", "rotation"}
    for kind in ("html", "md"):
        text = (study.folder / f"report.{kind}").read_text(encoding="utf-8")
        assert "does not hold" in text and "2 runs were not started" in text and "Preliminary" not in text
    assert run(["study", "report", str(path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["gate"]["held"] is False and answer["gate"]["difference"]["n"] == 2
    with pytest.raises(ConfigError, match=r"gate\.by"):  # it is fixed once the first run has started
        run_study(load_study(path, ["gate.by=0.001"]))


def test_a_gate_is_open_until_its_runs_are_there_and_shut_without_a_pair(write_toy):
    study = load_study(write_toy("ste", "rotation", **HOLDS))
    assert judge(study).held is None and "not decided" in verdict(collect(study))[0]
    study = load_study(write_toy("ste", "diverges", "scale", gate={"better": "ste", "than": "diverges", "by": 0}))
    assert run_study(study, say=lambda text: None) == {"done": 2, "diverged": 2, "waiting": 2}
    assert judge(study).held is False and "no seed has a number in both" in judge(study).sentence()


def test_a_gate_of_a_metric_of_which_more_is_better_and_with_tuning(write_toy):
    gate = {"better": "ste", "than": "random_rotation", "by": 0.1, "metric": "layer0/usage"}
    metrics = {"bits_per_byte": "min", "layer0/usage": "max"}
    tune = {"tune": {"train.lr": [0.01, 0.02]}, "tune_seeds": [7]}
    study = load_study(write_toy("ste", "random_rotation", "scale", gate=gate, metrics=metrics, **tune))
    assert run_study(study, say=lambda text: None) == {"done": 6 + 6}
    assert judge(study).held and judge(study).gain.mean > 0.1


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ({"better": "nobody", "than": "ste", "by": 0.1}, "gate.better = nobody: no such arm; there is ste, rotation"),
        ({"better": "ste", "than": "none", "by": 0.1}, "gate.than = none: no such arm"),
        ({"better": "ste", "than": "ste", "by": 0.1}, "name two arms"),
        ({"better": "ste", "than": "rotation", "by": -1}, "gate.by = -1"),
        ({"better": "ste", "than": "rotation", "by": 0.1, "metric": "x"}, "gate.metric = x: must be one of metrics"),
        ({"better": "ste", "than": "rotation"}, "gate.by"),
    ],
)
def test_a_gate_that_makes_no_sense_is_one_line(write_toy, gate, words):
    with pytest.raises(ConfigError) as caught:
        load_study(write_toy("ste", "rotation", gate=gate))
    assert words in str(caught.value) and "\n" not in str(caught.value)
