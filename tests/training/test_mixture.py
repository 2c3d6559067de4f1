"""A run on two sources, through every command."""

import json
import math
import shutil

import pytest
import yaml
from tiny_run import tiny_run
from typer.testing import CliRunner

from transformer_vq.cli import app
from transformer_vq.data import prepare_sources
from transformer_vq.training import load_run
from transformer_vq.training.language import run


def two_sources(folder, name, **more):
    (folder / "letters.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 120)
    (folder / "digits.txt").write_text("".join(f"{i * i % 9973} " for i in range(700)))
    config = tiny_run(folder, name, data__source="builtin", data__document_separator=None, **more)
    mix = {name: {"source": str(folder / f"{name}.txt"), "weight": w} for name, w in (("letters", 3), ("digits", 1))}
    data = type(config.data).model_validate({**config.data.model_dump(), "mix": mix})
    return config.model_copy(update={"data": data})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mix")
    return folder, run(two_sources(folder, "run", eval__every=10, data__tokenizer="bpe:280"), quiet=True)


def records(folder, name="run"):
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def test_numbers_are_by_source_and_together_the_mean_by_weights(trained):
    folder, summary = trained
    valid = [record for record in records(folder) if record["split"] == "valid"]
    for numbers in (summary["valid"], summary["test"], *valid):
        for key in ("loss", "bits_per_byte", "bits_per_token"):
            want = 0.75 * numbers[f"letters/{key}"] + 0.25 * numbers[f"digits/{key}"]
            assert numbers[key] == pytest.approx(want, rel=1e-12)
        assert numbers["letters/bits_per_byte"] != numbers["digits/bits_per_byte"]
        assert numbers["perplexity"] == pytest.approx(math.exp(numbers["loss"]))
        assert numbers["bytes"] == numbers["letters/bytes"] + numbers["digits/bytes"]
        assert "layer0/usage" in numbers


def test_every_command_takes_such_a_run(trained):
    folder, summary = trained
    name = str(folder / "run")

    def call(*args):
        result = CliRunner().invoke(app, [*args], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    found = json.loads(call("eval", name, "--split", "test", "--json"))["contexts"][0]
    assert {key: found[key] for key in found if key != "context"} == pytest.approx(
        {key: summary["test"][key] for key in found if key != "context"}
    )
    shown = call("eval", name)
    assert "letters" in shown
    assert "mean by weights" in shown
    heavier = json.loads(call("eval", name, "data.mix.digits.weight=3", "--split", "test", "--json"))["contexts"][0]
    assert heavier["loss"] == pytest.approx((found["letters/loss"] + found["digits/loss"]) / 2)
    one = json.loads(call("eval", name, f"data.source={folder / 'digits.txt'}", "--split", "test", "--json"))
    assert one["contexts"][0]["bits_per_byte"] == pytest.approx(found["digits/bits_per_byte"])
    positions = json.loads(call("length", name, "--times", "2", "--json"))["positions"]
    assert list(positions) == [f"{name} on letters", f"{name} on digits"]
    data = json.loads(call("data", name, "--json"))
    assert data["splits"]["train"]["bytes"] == sum(s["splits"]["train"]["bytes"] for s in data["sources"].values())
    assert data["sources"]["letters"]["weight"] == 3
    assert "0.75 of the windows" in call("data", name)
    assert json.loads(call("doctor", name, "--batches", "1", "--json"))["layers"]
    assert json.loads(call("generate", name, "--tokens", "5", "--json"))["texts"]


def test_it_does_not_depend_on_micro_batches(tmp_path):
    a = run(two_sources(tmp_path, "whole", train__precision="fp64", train__steps=6), quiet=True)
    b = run(two_sources(tmp_path, "parts", train__precision="fp64", train__steps=6, train__micro_batch=2), quiet=True)
    assert a["test"]["bits_per_byte"] == pytest.approx(b["test"]["bits_per_byte"], rel=1e-9)
    losses = [[r["loss_lm"] for r in records(tmp_path, n) if r["split"] == "train"] for n in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_it_resumes_and_starts_others(tmp_path):
    few = {"train__steps": 6, "checkpoint__every": 3}
    whole = run(two_sources(tmp_path, "whole", **few), quiet=True)
    folder = tmp_path / "whole"
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["mix"]["letters"]["weight"] == 3
    first, last = sorted((folder / "checkpoints").glob("step-*"))
    assert first.name.endswith("3")
    assert last.name.endswith("6")
    shutil.rmtree(last)
    (folder / "summary.json").unlink()
    again = run(two_sources(tmp_path, "whole", **few), resume=True, quiet=True)
    assert again["test"] == whole["test"]
    warm = run(two_sources(tmp_path, "warm", train__steps=1, train__init_from=str(folder), train__lr=1e-9), quiet=True)
    assert warm["test"]["digits/bits_per_byte"] == pytest.approx(whole["test"]["digits/bits_per_byte"], rel=0.05)


def test_bits_per_byte_of_training_count_the_bytes_that_are_drawn(trained):
    folder, _ = trained
    mixture = prepare_sources(load_run(str(folder / "run")).config.data)
    parts = {name: file.bytes / len(file) for name, file in mixture.files("train").items()}
    record = next(record for record in records(folder) if record["split"] == "train")
    want = record["loss_lm"] / math.log(2) / (0.75 * parts["letters"] + 0.25 * parts["digits"])
    assert record["bits_per_byte"] == pytest.approx(want)
