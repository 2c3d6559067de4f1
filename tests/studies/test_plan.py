"""Runs of a plan: resolved, hashed by content, within the budget."""

from __future__ import annotations

import shlex

import pytest
import yaml

from transformer_vq.config import ConfigError, RunConfig, load_config
from transformer_vq.studies.kinds import digest, flops_per_step, property_of
from transformer_vq.studies.plan import load_study

BASE = {
    "model": {"layers": 2, "width": 32, "key_dim": 8, "value_dim": 16, "window": 8, "quantizer": {"codes": 16}},
    "train": {"steps": 10, "batch_size": 2, "seq_len": 16},
}


@pytest.fixture
def write(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))

    def write_study(**settings):
        study = {
            "question": "Which?",
            "base": str(tmp_path / "base.yaml"),
            "run_dir": str(tmp_path / "out"),
            "seeds": [0, 1],
            "factors": {"model.quantizer.estimator": ["ste", "rotation"]},
            **settings,
        }
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(study, sort_keys=False))
        return path

    return write_study


def finals(study):
    return study.final_runs({arm.name: {} for arm in study.design.arms})


def test_seeds_come_outermost_and_every_run_is_resolved(write):
    runs = finals(load_study(write()))
    assert [(run.arm, run.seed) for run in runs] == [("ste", 0), ("rotation", 0), ("ste", 1), ("rotation", 1)]
    assert [run.settings.model.quantizer.estimator for run in runs] == ["ste", "rotation"] * 2
    assert [run.settings.seed for run in runs] == [0, 0, 1, 1]
    assert len({run.folder for run in runs}) == 4
    assert runs[1].folder.name.startswith("rotation-seed0-")
    assert runs[1].settings.run_dir == str(runs[1].folder)


def test_the_command_gives_the_same_configuration(write):
    for run in finals(load_study(write(overrides={"data.source": "a b.txt"}))):
        program, command, base, *overrides = shlex.split(run.command)
        assert (program, command) == ("transformer-vq", "train")
        assert load_config(base, overrides, RunConfig) == run.settings


def test_levels_that_mean_the_same_share_a_run(write):
    per_layer = {"0-1": {"estimator": "rotation"}}
    variants = {"default": {"model.quantizer.estimator": "rotation"}, "each": {"model.per_layer": per_layer}}
    default, each = finals(load_study(write(factors={}, variants=variants, seeds=[0])))
    assert default.digest == each.digest


def test_the_hash_sees_what_matters_and_nothing_else():
    config = RunConfig.model_validate(BASE)
    assert digest(config) == digest(config.model_copy(update={"run_dir": "elsewhere"}))
    moved = config.model_copy(update={"data": config.data.model_copy(update={"cache": "/cache"})})
    assert digest(config) == digest(moved)
    for change in ({"seed": 1}, {"train": config.train.model_copy(update={"lr": 2e-3})}):
        assert digest(config) != digest(config.model_copy(update=change))
    kinds = [{**BASE, "model": {**BASE["model"], "quantizer": {"kind": kind}}} for kind in ("vq", "fsq", "lfq", "none")]
    assert len({digest(RunConfig.model_validate(tree)) for tree in kinds}) == 4


def test_budget_of_tokens_sets_the_steps(write):
    runs = finals(load_study(write(budget={"tokens": 640}, factors={"train.batch_size": [2, 4]}, seeds=[0])))
    assert [run.settings.train.steps for run in runs] == [20, 10]


def test_budget_of_flops_matches_the_baseline(write):
    path = write(budget={"flops": "baseline"}, factors={"model.width": [32, 64]}, seeds=[0])
    narrow, wide = finals(load_study(path))
    assert narrow.settings.train.steps == 10
    spent = [flops_per_step(run.settings) * run.settings.train.steps for run in (narrow, wide)]
    assert spent[1] <= spent[0] < spent[1] + flops_per_step(wide.settings)


def test_every_arm_is_tuned_over_the_same_grid_where_it_has_the_key(write):
    path = write(
        factors={"model.quantizer": {"vq": {"kind": "vq", "codes": 16}, "none": {"kind": "none"}}},
        tune={"train.lr": [1e-3, 1e-2], "model.quantizer.commit": [0.0, 1e-3, 1e-2]},
        tune_seeds=[100],
    )
    study = load_study(path)
    assert [len(study.grids[name]) for name in ("vq", "none")] == [6, 2]
    assert len(study.tuning_runs()) == 8 and study.size() == 8 + 4
    chosen = {"vq": {"train.lr": 1e-2, "model.quantizer.commit": 1e-3}, "none": None}
    runs = study.final_runs(chosen)
    assert {run.arm for run in runs} == {"vq"}
    assert runs[0].settings.train.lr == 1e-2 and runs[0].settings.model.quantizer.commit == 1e-3


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"factors": {"model.quantizer.estimater": ["ste"]}}, "estimater: no such key; did you mean"),
        ({"factors": {"modle.layers": [1]}}, "modle: no such key; did you mean model"),
        ({"factors": {"model.per_layer.7.estimator": ["ste"]}}, '"7": the model has layers 0-1'),
        ({"factors": {"model.quantizer.estimator": ["stee"]}}, "model.quantizer.estimator = stee: "),
        ({"factors": {"model.layers": [0]}}, "model.layers = 0: must be at least 1"),
        ({"factors": {"train.lr": list(range(1, 502))}}, "1,002 runs, more than 1,000; say --yes"),
        ({"overrides": {"train.stepz": 1}}, "train.stepz: no such key"),
        ({"tune": {"train.lrr": [1.0]}, "tune_seeds": [9]}, "tune.train.lrr: no such key in any arm"),
        ({"tune": {"train.lr": [-1.0]}, "tune_seeds": [9]}, "train.lr = -1.0: must be greater than 0"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml: no such file"),
        ({"qestion": "?"}, "qestion: no such key; did you mean question?"),
    ],
)
def test_complaints_come_before_anything_runs(write, settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        load_study(write(**settings))


def test_more_than_a_thousand_runs_with_consent(write):
    rates = [float(i) for i in range(1, 502)]
    assert load_study(write(factors={"train.lr": rates}), many=True).size() == 1002


def test_a_base_must_say_what_it_is(write, tmp_path):
    (tmp_path / "other.yaml").write_text("seed: 1")
    with pytest.raises(ConfigError, match="must hold one of the keys recall, model"):
        load_study(write(base=str(tmp_path / "other.yaml")))


def test_an_override_of_a_dotted_key_leaves_its_neighbours(write):
    path = write(overrides={"train.lr": 0.5, "train.warmup": 3}, tune={"train.clip": [1.0, 2.0]}, tune_seeds=[9])
    arguments = ["overrides.train.lr=0.25", "factors.model.quantizer.estimator=[ste, scale]", "tune.train.clip=[4.0]"]
    study = load_study(path, [*arguments, "seeds=[7]"])
    assert study.settings.overrides == {"train.lr": 0.25, "train.warmup": 3}
    assert study.settings.factors == {"model.quantizer.estimator": ["ste", "scale"]}
    assert study.settings.tune == {"train.clip": [4.0]} and study.settings.seeds == [7]


def test_the_number_of_codes_is_a_property_of_pictures_too():
    for name, arm in {"studies/images-codes": "fsq 64", "studies/quantizers-tiny": "fsq mlp 64"}.items():
        runs = {run.arm: run.settings for run in finals(load_study(name, ["seeds=[0]"]))}
        assert property_of("codes", runs[arm]) == 64 and property_of("codes", runs["none"]) is None
        assert (property_of("state", runs[arm]) is None) == ("images" in name)


def test_recurrences_that_no_arm_scores_are_no_metric(write_toy):
    with pytest.raises(ConfigError, match=r"metrics\.recurrence/all/bits_per_byte: ste does not score recurrences"):
        load_study(write_toy("ste", "rotation", metrics={"recurrence/all/bits_per_byte": "min"}))
