"""Files, recipes, run folders and overrides become settings, or one line that says what is wrong."""

import pytest
import yaml

from transformer_vq.config import ConfigError, RunConfig, load_config, save_config, validate
from transformer_vq.config.load import difference, find_config, recipes, recipes_folder


@pytest.fixture
def config_file(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def test_a_number_in_scientific_notation_is_a_number(config_file):
    config = load_config(config_file("train: {lr: 4e-4}\n"), ["train.weight_decay=2e-4"], RunConfig)
    assert (config.train.lr, config.train.weight_decay) == (4e-4, 2e-4)


def test_an_override_reaches_a_layer_range(config_file):
    config = load_config(config_file("model: {layers: 4}\n"), ["model.per_layer.0-1.estimator=rotation"], RunConfig)
    assert [q.estimator for q in config.model.layer_quantizers()] == ["rotation", "rotation", "ste", "ste"]


def test_an_override_replaces_the_whole_value(config_file):
    path = config_file('model: {layers: 4, per_layer: {"0": {estimator: rotation}}}\n')
    assert load_config(path, ["model.per_layer=null"], RunConfig).model.per_layer is None
    kept = load_config(path, ["model.quantizer={kind: fsq, levels: [8, 4]}", "model.per_layer=null"], RunConfig)
    assert kept.model.quantizer.size == 32


def test_an_unquoted_layer_number_is_a_layer(config_file):
    config = load_config(config_file("model: {layers: 6, per_layer: {5: {codes: 7}}}\n"), [], RunConfig)
    assert [q.codes for q in config.model.layer_quantizers()] == [512] * 5 + [7]


@pytest.mark.parametrize("name", recipes())
def test_every_shipped_language_recipe_is_valid_by_name(name):
    if name.startswith("lm/"):
        load_config(name, [], RunConfig)
    assert find_config(name) == recipes_folder() / f"{name}.yaml"


def test_a_run_folder_is_a_config(tmp_path):
    save_config(validate({"seed": 3}, RunConfig), tmp_path / "config.yaml")
    assert load_config(tmp_path, [], RunConfig).seed == 3


def test_what_is_saved_is_read_back_equal(tmp_path):
    tree = {"model": {"layers": 3, "per_layer": {"0-1": {"kind": "fsq", "levels": [8, 4]}}}}
    config = validate(tree, RunConfig)
    resolved = config.model_copy(update={"model": config.model.resolved()})
    save_config(resolved, tmp_path / "config.yaml")
    again = load_config(tmp_path, [], RunConfig)
    assert again == resolved
    assert again.model.layer_quantizers() == config.model.layer_quantizers()


def test_difference_names_each_leaf():
    old, new = validate({}, RunConfig), validate({"seed": 1, "model": {"width": 8}}, RunConfig)
    assert difference(old.model_dump(), new.model_dump()) == ["seed: 0 -> 1", "model.width: 256 -> 8"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", None),
        ("[1, 2]", "must hold keys and values"),
        ("a: [1", "not readable as YAML"),
        ("seed: ${nowhere}", "not readable as YAML"),
    ],
)
def test_an_unreadable_file_is_one_line(config_file, text, message):
    if message is None:
        assert load_config(config_file(text), [], RunConfig) == RunConfig()
        return
    with pytest.raises(ConfigError, match=message) as error:
        load_config(config_file(text), [], RunConfig)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "seed: overrides are written dotted.key=value"),
        ("=3", "=3: overrides are written dotted.key=value"),
        ("seed=[1", "seed = [1: not readable as YAML"),
        ("seed.x=3", "seed.x: seed holds a value, not keys"),
    ],
)
def test_a_wrong_override_is_named(config_file, override, message):
    with pytest.raises(ConfigError) as error:
        load_config(config_file("seed: 0\n"), [override], RunConfig)
    assert str(error.value).startswith(message)


def test_a_missing_config_names_the_recipes():
    with pytest.raises(ConfigError, match=r"lm/tyny: no such file, run folder or recipe .*did you mean lm/tiny\?"):
        find_config("lm/tyny")


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match=r"a folder without config\.yaml"):
        find_config(tmp_path)


def test_yaml_written_by_us_needs_no_special_loader(tmp_path):
    save_config(RunConfig(), tmp_path / "config.yaml")
    assert validate(yaml.safe_load((tmp_path / "config.yaml").read_text()), RunConfig) == RunConfig()


def test_extends_fills_in_what_is_not_said(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 3\ntrain: {steps: 7, lr: 0.5}\nmodel: {quantizer: {kind: vq, codes: 32}}\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\ntrain: {steps: 9}\n")
    (tmp_path / "c.yaml").write_text(f"extends: {tmp_path / 'b.yaml'}\nmodel: {{quantizer: {{kind: none}}}}\n")
    found = load_config(tmp_path / "c.yaml", ["train.lr=0.25"], RunConfig)
    assert (found.seed, found.train.steps, found.train.lr, found.model.quantizer.kind) == (3, 9, 0.25, "none")
    assert load_config(tmp_path / "b.yaml", [], RunConfig).model.quantizer.codes == 32


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("extends: a.yaml", r"extends: .*a\.yaml extends .*a\.yaml, which has no end"),
        ("extends: nowhere", r"nowhere: no such file, run folder or recipe"),
        ("extends: 3", r"a\.yaml: extends = 3: must be the name of a config"),
        ("extends: lm/tiny\ntrain: {stepz: 3}", r"train\.stepz: no such key"),
    ],
)
def test_bad_extends_is_one_line(tmp_path, text, says):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says) as error:
        load_config(tmp_path / "a.yaml", [], RunConfig)
    assert "\n" not in str(error.value)
