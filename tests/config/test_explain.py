"""Every wrong setting is one line: key, value, what is allowed."""

import pytest

from transformer_vq.config import ConfigError, RunConfig, TransformerVQConfig, validate

LINES = [
    ({"modl": 3}, "modl: no such key; did you mean model?"),
    ({"model": {"widht": 3}}, "model.widht: no such key; did you mean model.width?"),
    ({"model": {"quantizer": {"estimatr": "ste"}}}, "model.quantizer.estimatr: no such key; did you mean"),
    (
        {"model": {"quantizer": {"kind": "none", "codes": 4}}},
        "model.quantizer.codes: no such key; known with kind none: kind",
    ),
    ({"model": {"quantizer": 3}}, "model.quantizer = 3: must be keys and values"),
    ({"model": 3}, "model = 3: must be keys and values"),
    ({"model": {"layers": "6"}}, "model.layers = 6: must be a whole number"),
    ({"model": {"layers": 2.5}}, "model.layers = 2.5: must be a whole number"),
    ({"model": {"layers": True}}, "model.layers = true: must be a whole number"),
    ({"model": {"layers": 0}}, "model.layers = 0: must be at least 1"),
    ({"model": {"window": -1}}, "model.window = -1: must be at least 0"),
    ({"model": {"cache": "yes"}}, "model.cache = yes: must be true or false"),
    ({"model": {"block": "x"}}, "model.block = x: must be gau, transformer"),
    ({"model": {"dropout_layer": 1.0}}, "model.dropout_layer = 1.0: must be less than 1"),
    ({"model": {"heads": 4, "kv_heads": 3}}, "model.kv_heads = 3: must divide heads = 4"),
    ({"model": {"key_dim": 5, "position": "rotary"}}, "model.key_dim = 5: must be even with position: rotary"),
    ({"model": {"width": 5}}, "model.width = 5: must be even"),
    ({"model": {"quantizer": {"codes": 0}}}, "model.quantizer.codes = 0: must be at least 1"),
    ({"model": {"quantizer": {"kind": "vqq"}}}, "model.quantizer = {'kind': 'vqq'}: must be of a kind among vq, simvq"),
    (
        {"model": {"quantizer": {"kind": "fsq", "levels": [8, 4], "codes": 3}}},
        "model.quantizer.codes = 3: must equal the product of levels [8, 4], 32",
    ),
    ({"model": {"quantizer": {"kind": "fsq", "levels": [8, 1]}}}, "model.quantizer.levels.1 = 1: must be at least 2"),
    ({"model": {"quantizer": {"kind": "fsq", "levels": []}}}, "model.quantizer.levels = []: must be of at least 1"),
    (
        {"model": {"quantizer": {"kind": "bsq", "bits": 4, "codes": 15}}},
        "model.quantizer.codes = 15: must equal 2^bits",
    ),
    ({"model": {"quantizer": {"estimator": "ibq"}}}, "model.quantizer.estimator = ibq: needs codebook: gradient"),
    (
        {"model": {"quantizer": {"wasserstein_weight": 1.0}}},
        "model.quantizer.wasserstein_weight = 1.0: needs codebook: gradient",
    ),
    (
        {"model": {"quantizer": {"commit_schedule": [[0, 1.0], [0, 2.0]]}}},
        "model.quantizer.commit_schedule: steps must be non-negative and increase",
    ),
    (
        {"model": {"layers": 6, "per_layer": {"4-9": {"codes": 3}}}},
        'model.per_layer "4-9": the model has layers 0-5; write ranges like "0-5", "0" or "all"',
    ),
    (
        {"model": {"layers": 6, "per_layer": {"0-3": {}, "3": {}}}},
        'model.per_layer "3": overlaps "0-3" at layer 3; a layer may be named once',
    ),
    ({"model": {"per_layer": {"2-1": {}}}}, 'model.per_layer "2-1": the model has layers 0-3'),
    ({"model": {"per_layer": {"all": {"codes": 0}}}}, "model.per_layer.all.codes = 0: must be at least 1"),
    ({"model": {"per_layer": {"all": {"code": 4}}}}, "model.per_layer.all.code: no such key; did you mean"),
    ({"train": {"micro_batch": 3}}, "train.micro_batch = 3: must divide batch_size = 16"),
    ({"train": {"betas": [0.9]}}, "train.betas.1: is missing"),
    ({"train": {"trackers": ["foo"]}}, "train.trackers.0 = foo: must be tensorboard, wandb, trackio"),
    ({"eval": {"context": 0}}, "eval.context = 0: must be full or at least 1"),
    ({"eval": {"context": "half"}}, "eval.context = half: must be full or a whole number"),
    ({"run_dir": ""}, "run_dir = : must be non-empty text"),
]


@pytest.mark.parametrize(("tree", "line"), LINES, ids=[line.split(":")[0] for _, line in LINES])
def test_the_line_names_key_value_and_what_is_allowed(tree, line):
    with pytest.raises(ConfigError) as error:
        validate(tree, RunConfig)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_layers_that_no_range_names_keep_the_default():
    config = TransformerVQConfig(
        layers=4,
        quantizer={"kind": "vq", "codes": 16, "commit": 0.5},
        per_layer={"1-2": {"estimator": "rotation"}, "3": {"kind": "fsq", "levels": [8, 4]}},
    )
    first, second, third, last = config.layer_quantizers()
    assert (first.estimator, second.estimator, third.estimator) == ("ste", "rotation", "rotation")
    assert second.codes == third.codes == 16, "an override of the same kind is merged over the default"
    assert second.commit == 0.5
    assert last.commit == 0.0, "an override that changes the kind starts from that kind's defaults"


def test_settings_are_immutable():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().seed = 3


def test_levels_may_be_a_tuple_in_python():
    assert validate({"model": {"quantizer": {"kind": "fsq", "levels": (8, 4)}}}, RunConfig).model.quantizer.size == 32
