"""Parameters cut over processes: the run is the one that a single process makes, and its checkpoints are anybody's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import torchrun
from helpers import assert_same
from many_processes import launch, records, tree, weights
from tiny_run import tiny_run

from transformer_vq.config import ConfigError, RunConfig, validate
from transformer_vq.training import load_run, run
from transformer_vq.training.checkpoints import CheckpointError, Checkpoints, load_tensors, verify
from transformer_vq.training.sharding import check_scalars, check_sharding, make_mesh
from transformer_vq.training.step import micro_batches

STEPS = 8
FP64 = {"train__precision": "fp64", "train__steps": STEPS}
CASES = {
    "accumulated": {**FP64, "train__micro_batch": 1, "data__document_boundaries": "reset", "train__weight_decay": 0.1},
    "streams": {**FP64, "train__micro_batch": 2, "data__order": "streams", "model__block": "transformer"},
    "kmeans": {
        **FP64,
        "train__micro_batch": 2,
        "model__quantizer": {"codes": 8, "init": "kmeans", "start_step": 3, "ema": 0.8},
    },
    "replaced": {
        **FP64,
        "train__micro_batch": 1,
        "model__quantizer": {"codes": 8, "init": "kmeans", "dead_code_threshold": 10.0, "ema": 0.8},
    },
    "uneven": {
        **FP64,
        "train__batch_size": 5,
        "train__micro_batch": None,
        "eval__every": 4,
        "model__checkpoint_activations": True,
        "model__tied_embedding": True,
        "model__per_layer": {"1": {"kind": "simvq"}},
    },
    "bf16": {"train__precision": "bf16", "train__steps": STEPS},
}


STEADY = {**FP64, "train__schedule": "constant"}


KILLED = """
import json, os, signal, sys
from transformer_vq.config import RunConfig, validate
from transformer_vq.training import run, snapshot
save = snapshot.save_parts
def parts(tensors, folder):
    if os.environ["RANK"] == "1" and folder.name == "model-optimizer" and "00000006" in str(folder):
        os.kill(os.getpid(), signal.SIGKILL)
    save(tensors, folder)
snapshot.save_parts = parts
with open(sys.argv[1], encoding="utf-8") as file:
    run(validate(json.load(file), RunConfig), quiet=True)
"""


SUMS = {"loss", "loss_lm", "bits_per_byte", "grad_norm", "loss_commit", "lr", "layer0/norm_ratio"}
"""Numbers of a record that do not depend on which rows share a forward pass."""


def compare(sharded: Path, alone: Path, case: str, processes: int) -> None:
    ours, theirs = (json.loads((path / "summary.json").read_text(encoding="utf-8")) for path in (alone, sharded))
    assert theirs["processes"] == processes and theirs["parameters"] == ours["parameters"]
    if case == "bf16":  # Adam turns rounding into steps
        want, got = records(alone)["loss"], records(sharded)["loss"]
        assert_same({"loss": got}, {"loss": want}, rtol=2e-2)
        return
    got, want = records(sharded), records(alone)
    names = SUMS if case == "uneven" or processes == 4 else want.keys()
    assert got.keys() == want.keys() >= SUMS
    assert_same({name: got[name] for name in names}, {name: want[name] for name in names}, rtol=1e-7)
    assert_same(weights(sharded, STEPS), weights(alone, STEPS), rtol=1e-7)
    assert theirs["test"]["bits_per_byte"] == pytest.approx(ours["test"]["bits_per_byte"], rel=1e-8)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    cases = {**CASES, "begun": {**STEADY, "train__steps": 3}}
    launch(folder, [(tree(folder, name, train__shard="full", **case), False) for name, case in cases.items()], 2)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_a_sharded_run_is_the_run_of_one_process(two, tmp_path, case):
    run(tiny_run(tmp_path, case, **CASES[case]), quiet=True)
    compare(two / case, tmp_path / case, case, processes=2)


@pytest.mark.distributed
def test_a_process_holds_its_part(two):
    """Half of the parameters, but for what does not divide."""
    summary = json.loads((two / "accumulated" / "summary.json").read_text(encoding="utf-8"))
    assert 0.5 * summary["parameters"] <= summary["parameters_per_process"] <= 0.55 * summary["parameters"]


@pytest.mark.distributed
def test_each_process_writes_its_parts(two, tmp_path):
    """Half of the bytes each, every file in the manifest, and anybody's to load; one flipped bit is noticed."""
    folder = two / "accumulated" / "checkpoints" / f"step-{STEPS:08d}"
    files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    for part in ("model", "model-optimizer"):
        sizes = [entry["bytes"] for name, entry in files.items() if name.startswith(f"{part}/")]
        assert len(sizes) == 2 and max(sizes) < 0.7 * sum(sizes)
        assert f"{part}.safetensors" not in files and not (folder / f"{part}.safetensors").exists()
    loaded = load_run(str(two / "accumulated"))
    assert_same(dict(loaded.model.state_dict()), load_tensors(folder / "model.safetensors"), rtol=0)
    copy = shutil.copytree(folder, tmp_path / folder.name)
    verify(copy)
    damaged = sorted(copy.glob("model/*"))[1]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(CheckpointError, match=damaged.name):
        verify(copy)


@pytest.mark.distributed
def test_a_kill_while_parts_are_written_leaves_the_checkpoint_before(two, tmp_path):
    """Rank 1 dies after its part of the model, before that of the optimizer."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED, encoding="utf-8")
    todo = tmp_path / "runs.json"
    settings = {**STEADY, "checkpoint__every": 3}
    todo.write_text(json.dumps(tree(tmp_path, "killed", train__shard="full", **settings)), encoding="utf-8")
    torchrun(2, str(script), str(todo), fails=True)
    folder = tmp_path / "killed" / "checkpoints"
    assert list(folder.glob(".writing-00000006/model/*.safetensors"))
    assert Checkpoints(folder).last_whole() == (3, [])
    run(tiny_run(tmp_path, "killed", **settings), quiet=True, resume=True)
    run(tiny_run(tmp_path, "alone", **settings), quiet=True)
    assert_same(weights(tmp_path / "killed", STEPS), weights(tmp_path / "alone", STEPS), rtol=1e-7)


@pytest.mark.distributed
def test_one_process_goes_on_where_two_stopped(two, tmp_path):
    run(tiny_run(tmp_path, "alone", **STEADY), quiet=True)
    run(tiny_run(two, "begun", **STEADY, train__shard="none"), quiet=True, resume=True)
    assert_same(weights(two / "begun", STEPS), weights(tmp_path / "alone", STEPS), rtol=1e-7)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("begun_by", [1, 2])
def test_two_processes_go_on_where_one_or_two_stopped(tmp_path, begun_by):
    run(tiny_run(tmp_path, "alone", **STEADY), quiet=True)
    begun = {**STEADY, "train__steps": 3}
    runs = [(tree(tmp_path, "begun", train__shard="full", **STEADY), True)]
    if begun_by == 1:
        run(tiny_run(tmp_path, "begun", **begun), quiet=True)
    else:
        runs.insert(0, (tree(tmp_path, "begun", train__shard="full", **begun), False))
    launch(tmp_path, runs, 2)
    assert_same(weights(tmp_path / "begun", STEPS), weights(tmp_path / "alone", STEPS), rtol=1e-7)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("shard", ["full", "hybrid"])
def test_four_processes(tmp_path, shard):
    """Of two machines with two each, as far as `hybrid` is told."""
    folder = tmp_path / "four"
    folder.mkdir()
    cases = {name: settings for name, settings in CASES.items() if name != "replaced"}
    settings = {name: {**case, "train__batch_size": 8, "train__micro_batch": None} for name, case in cases.items()}
    launch(folder, [(tree(folder, name, train__shard=shard, **settings[name]), False) for name in cases], 4, LOCAL="2")
    for name in cases:
        run(tiny_run(tmp_path, name, **settings[name]), quiet=True)
        compare(folder / name, tmp_path / name, name, processes=4)
    held = json.loads((folder / "streams" / "summary.json").read_text(encoding="utf-8"))
    assert held["parameters_per_process"] / held["parameters"] == pytest.approx(
        {"full": 0.25, "hybrid": 0.5}[shard], abs=0.06
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train__optimizer": "muon"}, "train.optimizer = muon: looks at whole matrices, which train.shard = full"),
        ({"train__optimizer": "adafactor"}, "train.optimizer = adafactor"),
        ({"train__micro_batch": 1, "train__batch_size": 3}, "2 do not share train.batch_size = 3 evenly"),
    ],
)
def test_what_cannot_be_cut_is_one_line(tmp_path, settings, words):
    train = tiny_run(tmp_path, train__shard="full", **settings).train
    with pytest.raises(ConfigError) as caught:
        check_sharding(train, train.shard, 2)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    check_sharding(train, train.shard, 1)  # nothing is cut
    check_sharding(train, "none", 2)


def test_a_parameter_without_axes_is_refused_in_one_line(tmp_path):
    settings = tiny_run(tmp_path, model__absolute_positions=True)
    with pytest.raises(ConfigError, match=r"model\.absolute_positions = true: .* one number"):
        check_scalars(settings.model, "hybrid", 2)
    check_scalars(settings.model, "full", 1)
    check_scalars(settings.model, "none", 2)


def test_machines_have_equal_numbers(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="8 processes are no whole number of machines with 3"):
        make_mesh("hybrid", torch.device("cpu"), 8)


def test_no_other_layout_than_these():
    with pytest.raises(ConfigError, match=r"train\.shard"):
        validate({"train": {"shard": "half"}}, RunConfig)


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("micro", [None, 1, 2, 3, 4])
def test_all_processes_make_as_many_forward_passes(processes, micro):
    for batch in range(processes, 40):
        if micro == 1 and batch % processes:
            continue  # refused
        train = SimpleNamespace(batch_size=batch, micro_batch=micro)
        parts = [micro_batches(train, rank, processes, even=True) for rank in range(processes)]
        assert len({len(part) for part in parts}) == 1
        assert [row for part in parts for rows in part for row in rows] == list(range(batch))
        sizes = [len(rows) for part in parts for rows in part]
        assert min(sizes) >= 1 and max(sizes) <= (micro or batch)
