"""The benchmarks run and say what they promise; what they measure is nobody's test."""

import json

import pytest
import torch

from transformer_vq.bench import comparison, device, generation, llama, train, turns
from transformer_vq.bench.turns import in_turns, ratios
from transformer_vq.bench.work import Work
from transformer_vq.cli import run
from transformer_vq.config import ConfigError


def test_generation_names_each_position():
    near, far = generation.run(positions=(8, 64), repeats=2, compare_up_to=8, layers=1)
    assert (near["position"], far["position"]) == (8, 64)
    assert near["to_first"] == 1.0 and far["to_first"] > 0 and far["milliseconds"] > 0
    assert near["others"].keys() == {"Llama", "ours, full"} and not far["others"]
    assert all(other["ratio"] > 0 for other in near["others"].values())


def test_half_the_bytes_are_read_in_half_the_type():
    wide, narrow = (generation.run((8,), 2, compare_up_to=0, layers=1, dtype=dtype)[0] for dtype in ("fp32", "bf16"))
    assert wide["mib"] / 2 < narrow["mib"] < 0.65 * wide["mib"]  # counts and means stay fp32


def test_the_compiled_step_takes_part_where_asked(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    (row,) = train.run(lengths=(24,), repeats=2, tokens=48, layers=1, compiled=True)
    assert len(compiled) == 1 and row["others"][train.COMPILED]["ratio"] > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_names_each_length_and_moves_all_models(precision, monkeypatch):
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: steps.append(self))
    (row,) = train.run(lengths=(24,), repeats=2, tokens=48, layers=1, precision=precision)
    assert (row["length"], row["rows"]) == (24, 2) and row["others"].keys() == {"Llama", "ours, full"}
    assert row["tokens_per_s"] == pytest.approx(48e3 / row["milliseconds"])
    assert all(0 < its["ratio_low"] <= its["ratio"] <= its["ratio_high"] for its in row["others"].values())
    assert len(set(map(id, steps))) == 3


def test_the_models_that_are_compared_have_one_shape():
    """Up to norms' biases, the quantizer and the head's bias, which Llama has not."""
    for name in ("small", "125M"):
        with torch.device("meta"):
            mine = llama.ours(name)
            theirs, kept = llama.llama(mine.config), llama.full(mine.config)
        sizes = [
            sum(p.numel() for n, p in model.named_parameters() if p.ndim > 1 and "quantizer" not in n)
            for model in (mine, theirs, kept)
        ]
        assert sizes[0] == sizes[1] == sizes[2]
        assert not any(layer.quantizes for layer in kept.layers) and all(layer.quantizes for layer in mine.layers)


def test_what_fails_is_absent_and_says_why():
    def broken():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    class Foreign(Exception):
        """As a compiler of kernels raises."""

    def foreign():
        raise Foreign("does not compile")

    assert comparison.able(lambda: foreign) == "fails here: Foreign: does not compile"
    assert comparison.able(lambda: broken) == "fails here: OutOfMemoryError: CUDA out of memory."
    assert comparison.able(lambda: "needs a GPU") == "needs a GPU"
    row = comparison.row("n", 1, {"ours": [1.0]}, Work(1, 1), {"theirs": "fails here"})
    assert comparison.absent([row]) == {"theirs": "fails here"} and list(comparison.lines([row], "n")) == ["ours"]


def test_a_model_that_cannot_be_built_is_absent(monkeypatch):
    def lacking(config):
        raise ConfigError("bench: Llama: needs transformers")

    for module, run_it in (
        (train, lambda: train.run(lengths=(16,), repeats=1, tokens=16, layers=1)),
        (generation, lambda: generation.run(positions=(8,), repeats=1, layers=1)),
    ):
        monkeypatch.setattr(module, "llama", lacking)
        (row,) = run_it()
        assert "needs transformers" in row["others"]["Llama"]["absent"] and row["others"]["ours, full"]["ratio"] > 0


def test_ceilings_are_of_the_type_that_is_measured():
    assert device.type_of({"precision": "bf16"}, "fp32") == device.type_of({"dtype": "bf16"}, None) == torch.bfloat16
    assert device.type_of({"shape": "125M"}, "fp32") == torch.float32 and device.type_of({}, None) is None


def test_the_table_shows_spread_of_every_side():
    row = comparison.row("n", 1024, {"ours": [1.0, 2.0, 3.0], "theirs": [4.0, 4.0, 9.0]}, Work(1e9, 1), {"x": "why"})
    assert row["others"]["theirs"]["ratio"] == 3.0
    headings, (mine, its) = comparison.cells([row], "n", {"gflop": ("GFLOP", ".1f"), "nobody": ("", "")})
    assert headings == ("n", "", "ms", "quartiles", "× ours", "quartiles", "GFLOP")
    assert mine == ("1,024", "ours", "2,000", "1,500 - 2,500", "", "", "1.0")
    assert its == ("1,024", "theirs", "4,000", "4,000 - 6,500", "3.00", "2.50 - 3.50", "")


@pytest.mark.parametrize(
    "arguments", [["train", "--shape", "huge"], ["train", "--precision", "fp8"], ["generation", "--dtype", "int4"]]
)
def test_an_unknown_name_is_the_users(arguments, capsys):
    assert run(["bench", *arguments]) == 2
    assert f"{arguments[1]} {arguments[2]}: must be one of" in capsys.readouterr().err


def test_contestants_take_turns_and_the_first_two_do_not_count():
    order: list[str] = []
    found = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, "cpu")
    assert order == ["a", "b"] * 5 and [len(found[name]) for name in "ab"] == [3, 3]
    assert ratios([2.0, 6.0, 4.0], [1.0, 2.0, 1.0]) == (2.5, 3.0, 3.5)
    assert ratios([3.0], [1.0]) == (3.0, 3.0, 3.0)


def test_short_steps_are_queued_on_a_gpu_and_long_ones_are_not(monkeypatch):
    clock, steps = [0.0], []

    def step(name, seconds):
        steps.append(name)
        clock[0] += seconds

    monkeypatch.setattr(turns.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    contest = {"short": lambda: step("short", 0.01), "long": lambda: step("long", 0.1)}
    found = in_turns(contest, 2, "cuda")
    assert found["short"] == pytest.approx([0.01] * 2) and found["long"] == pytest.approx([0.1] * 2)
    assert (steps.count("short"), steps.count("long")) == (1 + 3 * turns.QUEUED, 4)
    steps.clear()
    in_turns(contest, 2, "cpu")
    assert (steps.count("short"), steps.count("long")) == (4, 4)


def test_the_command_prints_one_json_object(capsys, monkeypatch):
    monkeypatch.setattr(generation, "run", lambda repeats: [{"position": repeats, "milliseconds": 1.0, "others": {}}])
    monkeypatch.setattr(device, "ceilings", lambda dtype: device.Ceilings(1e11, 1e10))
    assert run(["bench", "generation", "--repeats", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bench"] == "generation" and found["rows"][0]["position"] == 3
    assert found["ceilings"] == {"flops": 1e11, "bandwidth": 1e10}


@pytest.mark.parametrize("arguments", [["bench", "nothing"], ["bench", "attention", "--length", "0"]])
def test_a_wrong_call_is_the_users(arguments, capsys):
    assert run(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
