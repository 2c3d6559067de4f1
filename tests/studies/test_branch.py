"""Arms that go on from one base a seed."""

from __future__ import annotations

import pytest
import yaml

from transformer_vq.config import ConfigError
from transformer_vq.studies.folder import read_status
from transformer_vq.studies.plan import load_study
from transformer_vq.studies.results import collect, table
from transformer_vq.studies.run import run_study, state_of
from transformer_vq.studies.trial import estimate
from transformer_vq.studies.words import describe
from transformer_vq.training.checkpoints import load_tensors

RECALL = {
    "recall": {"task": "mqar", "vocab": 16, "pairs": 2, "examples": 8},
    "model": {"layers": 1, "width": 16, "key_dim": 8, "value_dim": 8, "window": 4, "block_len": 4},
    "train": {"steps": 2, "batch_size": 2, "seq_len": 16, "warmup": 0, "lr": 1.0e-9, "log_every": 1},
    "eval": {"every": None, "batch_size": 8},
}
BRANCH = {"from": {"train.lr": 0.01}, "steps": 3}


def write(tmp_path, base=RECALL, **settings):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    study = {
        "base": str(tmp_path / "base.yaml"),
        "run_dir": str(tmp_path / "out"),
        "overrides": {"model.quantizer.codes": 4},
        "variants": {"vq": {}, "exact": {"model.quantizer": {"kind": "none"}}, "more": {"model.quantizer.codes": 8}},
        "seeds": [0],
        "branch": BRANCH,
        **settings,
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return tmp_path / "study.yaml"


def test_arms_go_on_from_the_base_with_codebooks_of_their_own(tmp_path):
    study, said = load_study(write(tmp_path)), []
    assert run_study(study, say=said.append) == {"done": 4}
    assert said[0].startswith("bases: 1") and said[2].startswith("runs: 3")
    (base,), arms = study.base_runs(), study.final_runs({})
    weights = {run.arm: load_tensors(next(run.folder.glob("checkpoints/*/model.safetensors"))) for run in [base, *arms]}
    for arm in ("vq", "exact", "more"):  # the arms' learning rate is next to nothing
        same = {name for name in weights[arm] if ".quantizer." not in name}
        assert all(weights[arm][name].allclose(weights["base"][name], atol=1e-6) for name in same) and same
    own = [name for name in weights["vq"] if name.endswith("codebook") or ".quantizer." in name]
    assert any(not weights["vq"][name].equal(weights["base"][name]) for name in own)
    assert arms[0].settings.model.quantizer.init == "kmeans" and arms[0].settings.train.init_quantizers == "fresh"
    assert "train.init_from=" in arms[0].command and "model.quantizer.init=kmeans" in arms[0].command
    assert base.settings.seed != arms[0].settings.seed and base.settings.train.steps == 3

    assert run_study(study, say=said.append) == {"done": 4} and read_status(base.folder)["attempts"] == 1
    assert set(table(collect(study))["stage"]) == {"base", "final"}
    words = describe(collect(study))
    assert "Late training" in words["branch"] and "trained for 3" in words["branch"]
    (tmp_path / "out").rename(tmp_path / "moved")  # runs are known by what they are, wherever they lie
    moved = load_study(tmp_path / "study.yaml", [f"run_dir={tmp_path / 'moved'}"])
    assert {state_of(run) for run in moved.final_runs({})} == {"done"}


def test_a_branch_survives_saving_and_its_start_can_be_changed_from_the_console(tmp_path):
    study = load_study(write(tmp_path), ["branch.from.train.lr=0.02", "branch.steps=5"])
    assert study.base_runs()[0].settings.train.lr == 0.02 and study.base_runs()[0].settings.train.steps == 5
    assert study.settings.model_dump(mode="json")["branch"] == {"from": {"train.lr": 0.02}, "steps": 5}


def test_arms_wait_for_a_base_that_failed_and_the_plan_counts_bases(write_toy):
    study, said = (
        load_study(write_toy("ste", branch={"from": {"model.quantizer.estimator": "is_broken"}, "steps": 5})),
        [],
    )
    assert study.size() == 4
    assert run_study(study, say=said.append) == {"failed": 2, "waiting": 2}
    assert any("cannot start, for the base of seed 0, 1 has not finished" in line for line in said)


def test_a_trial_of_a_branch_needs_no_base(write_toy):
    study = load_study(write_toy("ste", branch={"from": {}, "steps": 5}, seeds=[0]))
    assert estimate(study).seconds > 0 and not study.folder.exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"variants": {"wide": {"model.width": 32}}}, "branch: wide has model.width = 32, and the base 16"),
        ({"branch": {"from": {"model.layers": 2}, "steps": 1}}, "model.layers = 1, and the base 2"),
        ({"variants": {"v": {"recall.vocab": 32}}}, "recall.vocab = 32, and the base 16"),
        ({"branch": {"from": {}, "steps": 0}}, "branch.steps = 0"),
        ({"branch": {"from": {}}}, "branch.steps"),
        ({"branch": {"from": {"model.widht": 3}, "steps": 1}}, "model.widht: no such key"),
        ({"base": {"toy": {}}, "overrides": {}, "variants": {"a": {}}}, "branch: is for language models"),
    ],
)
def test_a_branch_that_cannot_be_is_one_line(tmp_path, settings, words):
    with pytest.raises(ConfigError) as caught:
        load_study(write(tmp_path, **settings))
    assert words in str(caught.value) and "\n" not in str(caught.value)
