"""Arms and comparisons of every design, against lists written by hand."""

from __future__ import annotations

import pytest

from transformer_vq.config import ConfigError, validate
from transformer_vq.config.study import StudyConfig
from transformer_vq.studies.design import grid_size, label, make_design, short_names

ESTIMATOR, CODES = "model.quantizer.estimator", "model.quantizer.codes"


def study(**settings):
    return validate({"question": "?", "base": "lm/tiny", "run_dir": "x", "seeds": [0], **settings}, StudyConfig)


def names(design):
    return [arm.name for arm in design.arms]


def test_grid_is_the_product_and_compares_with_the_first_levels():
    design = make_design(study(factors={ESTIMATOR: ["ste", "rotation"], CODES: [64, 128]}), layers=4)
    assert names(design) == ["ste · codes=64", "ste · codes=128", "rotation · codes=64", "rotation · codes=128"]
    assert set(design.references.values()) == {"ste · codes=64"} and len(design.references) == 3
    assert design.arm("rotation · codes=128").settings == {ESTIMATOR: "rotation", CODES: 128}


def test_a_baseline_that_leaves_a_factor_open_compares_within_its_levels():
    design = make_design(
        study(
            factors={ESTIMATOR: ["ste", "rotation"], CODES: [64, 128]},
            baseline={ESTIMATOR: "ste"},
            primary={"levels": {ESTIMATOR: "rotation", CODES: 128}},
        ),
        layers=4,
    )
    assert design.references == {"rotation · codes=64": "ste · codes=64", "rotation · codes=128": "ste · codes=128"}
    assert design.primary == "rotation · codes=128"


def test_one_at_a_time_varies_one_factor_about_the_centre():
    design = make_design(
        study(
            factors={ESTIMATOR: ["ste", "rotation"], CODES: [64, 128, 256]},
            design="one_at_a_time",
            baseline={CODES: 128},
        ),
        layers=4,
    )
    assert names(design) == ["ste · codes=128", "rotation · codes=128", "ste · codes=64", "ste · codes=256"]
    assert set(design.references.values()) == {"ste · codes=128"}


def test_leave_one_layer_in_and_out():
    factors = {ESTIMATOR: ["ste", "rotation"]}
    inward = make_design(study(factors=factors, design="leave_one_layer_in"), layers=2)
    assert names(inward) == ["ste everywhere", "rotation everywhere", "rotation in layer 0", "rotation in layer 1"]
    assert inward.arm("rotation in layer 1").settings == {ESTIMATOR: "ste", "model.per_layer.1.estimator": "rotation"}
    assert inward.references["rotation in layer 1"] == "ste everywhere"
    outward = make_design(study(factors=factors, design="leave_one_layer_out"), layers=2)
    assert outward.arm("rotation but in layer 0").settings == {
        ESTIMATOR: "rotation",
        "model.per_layer.0.estimator": "ste",
    }
    assert outward.references["rotation but in layer 0"] == "rotation everywhere"
    assert outward.references["rotation everywhere"] == "ste everywhere"


def test_leave_one_layer_with_whole_blocks():
    blocks = {"vq": {"kind": "vq"}, "fsq": {"kind": "fsq", "levels": [8, 8]}}
    design = make_design(study(factors={"model.quantizer": blocks}, design="leave_one_layer_in"), layers=1)
    assert design.arm("fsq in layer 0").settings == {
        "model.quantizer": {"kind": "vq"},
        "model.per_layer.0": {"kind": "fsq", "levels": [8, 8]},
    }


def test_random_draws_the_same_subset_and_adds_what_it_is_compared_with():
    factors = {ESTIMATOR: ["ste", "rotation"], CODES: list(range(1, 51))}
    settings = study(factors=factors, baseline={ESTIMATOR: "ste"}, design={"kind": "random", "n": 7, "seed": 3})
    design = make_design(settings, layers=4)
    assert names(design) == names(make_design(settings, layers=4))
    assert len(set(names(design))) == len(design.arms) >= 7
    assert all(reference in names(design) for reference in design.references.values())
    assert sum(name.startswith("rotation") for name in names(design)) == len(design.references)
    with pytest.raises(ConfigError, match=r"design\.n = 101: must be at most 100"):
        make_design(study(factors=factors, design={"kind": "random", "n": 101}), layers=4)


def test_a_random_subset_of_a_huge_grid_is_drawn_at_once():
    factors = {f"a.{i}": list(range(100)) for i in range(8)}
    settings = study(factors=factors, design={"kind": "random", "n": 3})
    assert grid_size(settings) == 100**8
    assert len(make_design(settings, layers=None).arms) in (3, 4)


def test_variants_set_several_keys_and_are_named():
    variants = {
        "full": {"model.quantizer": {"kind": "none"}},
        "window only": {"model.cache": False, "model.window": 64},
    }
    design = make_design(study(variants=variants, factors={ESTIMATOR: ["ste"]}), layers=4)
    assert names(design) == ["full · ste", "window only · ste"]
    assert design.arm("window only · ste").settings == {"model.cache": False, "model.window": 64, ESTIMATOR: "ste"}


def test_against_names_a_reference_arm_by_arm():
    variants = {name: {CODES: i + 1} for i, name in enumerate(["vq 64", "fsq 64", "vq 512", "fsq 512"])}
    settings = study(variants=variants, factors={}, against={"fsq 512": "vq 512"})
    design = make_design(settings, layers=4)
    assert design.references == {"fsq 64": "vq 64", "vq 512": "vq 64", "fsq 512": "vq 512"}
    assert design.contrasts()["fsq 512"] == ("", "fsq 512 − vq 512")
    with pytest.raises(ConfigError, match=r"against\.fsq: no arm fsq; there is vq 64"):
        make_design(study(variants=variants, factors={}, against={"fsq": "vq 64"}), layers=4)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"baseline": {"nothing": 1}}, "baseline.nothing: no such factor"),
        ({"baseline": {CODES: 65}}, f"baseline.{CODES} = 65: no such level; there is 64, 128"),
        ({"primary": {"levels": {CODES: 64}}}, "compared with nothing"),
        ({"baseline": {CODES: 64}, "primary": {"levels": {CODES: 128}}}, f"must name a level of {ESTIMATOR} too"),
        ({"design": "leave_one_layer_in"}, "needs one factor"),
        ({"factors": {CODES: [64, 64]}}, "names a level twice"),
        ({"factors": {CODES: []}}, "an empty grid"),
        ({"factors": {}}, "an empty grid"),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"seeds": [1], "tune": {"train.lr": [0.1]}, "tune_seeds": [1]}, "must share none with seeds"),
        ({"tune": {"train.lr": [0.1]}}, "tuning needs seeds of its own"),
        ({"primary": {"levels": {CODES: 128}, "metric": "bpb"}}, "primary.metric = bpb: must be one of metrics"),
        ({"budget": {"tokens": 1, "flops": 1.0}}, "name one of tokens and flops"),
    ],
)
def test_complaints(settings, complaint):
    factors = {ESTIMATOR: ["ste", "rotation"], CODES: [64, 128]}
    with pytest.raises(ConfigError, match=complaint):
        make_design(study(**{"factors": factors, **settings}), layers=4)


def test_labels_and_short_names():
    assert [label(v) for v in ("ste", 1e-4, True, None, 64)] == ["ste", "0.0001", "true", "null", "64"]
    assert label({"kind": "fsq", "levels": [8, 8]}) == "fsq levels=[8, 8]"
    assert short_names(["a.b.c", "d.c", "e"]) == {"a.b.c": "b.c", "d.c": "d.c", "e": "e"}
