"""Sequences cut over processes: the run is the one that a single process makes of whole sequences."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import assert_same
from many_processes import launch, records, tree, weights
from tiny_run import tiny_run

from transformer_vq.cli import run as command
from transformer_vq.config import ConfigError
from transformer_vq.training import run
from transformer_vq.training.context import check_context

SUMS = ("loss", "loss_lm", "bits_per_byte", "grad_norm", "loss_commit", "lr", "layer0/norm_ratio")
"""Numbers of a record that do not depend on which tokens share a forward pass."""
STEPS = 8
FP64 = {"train__precision": "fp64", "train__steps": STEPS, "train__weight_decay": 0.1}
QUICK = {
    "documents": {
        **FP64,
        "train__micro_batch": 2,
        "data__document_boundaries": "reset",
        "model__conv": 3,
        "model__absolute_positions": True,
        "model__dropout_residual": 0.1,
        "model__dropout_layer": 0.1,
        "model__dropout_sinusoid": 0.1,
        "model__quantizer": {"codes": 8, "init": "kmeans", "dead_code_threshold": 10.0, "ema": 0.8},
    },
    "streams": {**FP64, "data__order": "streams", "model__block": "transformer", "model__conv": 2},
}
CASES = {
    "block": {
        **FP64,
        "train__batch_size": 2,
        "model__gradients": "block",
        "model__block_len": 4,
        "model__position": "rotary",
    },
    "cut": {**FP64, "model__gradients": "block", "model__block_len": 4, "model__grad_through_cache": False},
    "no gradient": {**FP64, "model__grad_through_cache": False, "model__position": "scalar"},
    "no cache": {**FP64, "model__cache": False, "model__per_layer": {"1": {"kind": "none"}}},
    "exact": {**FP64, "model__window_keys": "exact", "model__position": "none"},
    "recomputed": {**FP64, "model__checkpoint_activations": True, "data__order": "streams", "train__micro_batch": 2},
    "gradient": {**FP64, "model__quantizer": {"codes": 8, "codebook": "gradient", "estimator": "rotation"}},
    "full": {**FP64, "train__shard": "full", "train__micro_batch": 2, "model__tied_embedding": True},
    "bf16": {**FP64, "train__precision": "bf16"},
}


def check(folder: Path, tmp_path: Path, case: str, settings: dict, processes: int) -> None:
    alone = {**settings, "train__shard": "none"}
    run(tiny_run(tmp_path, case, **alone), quiet=True)
    ours, theirs = tmp_path / case, folder / case
    assert json.loads((theirs / "summary.json").read_text(encoding="utf-8"))["processes"] == processes
    got, want = records(theirs), records(ours)
    if case == "bf16":  # Adam turns rounding into steps
        assert_same({"loss": got["loss"]}, {"loss": want["loss"]}, rtol=2e-2)
        return
    assert_same({name: got[name] for name in SUMS}, {name: want[name] for name in SUMS}, rtol=1e-7)
    assert_same(weights(theirs, STEPS), weights(ours, STEPS), rtol=1e-7)


STEADY = {**QUICK["streams"], "train__schedule": "constant"}
HALF, CUT = {**STEADY, "train__steps": STEPS // 2}, {"train__context_parallel": 2}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("context")
    run(tiny_run(folder, "cut later", **HALF), quiet=True)
    runs = [
        (tree(folder, "documents", **QUICK["documents"], **CUT), False),
        (tree(folder, "cut later", **STEADY, **CUT), True),
    ]
    launch(folder, runs, 2)
    return folder


@pytest.mark.distributed
def test_two_pieces_are_the_run_of_one_process(two: Path, tmp_path: Path) -> None:
    check(two, tmp_path, "documents", QUICK["documents"], 2)


@pytest.mark.distributed
def test_streams_of_one_process_go_on_in_pieces(two: Path, tmp_path: Path) -> None:
    check(two, tmp_path, "cut later", STEADY, 2)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resumed")
    runs = [
        (tree(folder, "resumed", **HALF, **CUT), False),
        (tree(folder, "resumed", **STEADY, **CUT), True),
        (tree(folder, "joined later", **HALF, **CUT), False),
    ]
    launch(folder, runs, 2)
    run(tiny_run(folder, "joined later", **STEADY), resume=True, quiet=True)
    return folder


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("case", "processes"), [("resumed", 2), ("joined later", 1)])
def test_streams_in_pieces_go_on(resumed: Path, tmp_path: Path, case: str, processes: int) -> None:
    check(resumed, tmp_path, case, STEADY, processes)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two lines of two, and one of four."""
    folder = tmp_path_factory.mktemp("contexts")
    cases = {**QUICK, **CASES}
    runs = [(tree(folder, name, train__context_parallel=2, **case), False) for name, case in cases.items()]
    long = {"train__seq_len": 32, "train__context_parallel": 4}
    runs += [(tree(folder, f"long {name}", **{**QUICK[name], **long}), False) for name in QUICK]
    launch(folder, runs, 4)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.distributed
@pytest.mark.parametrize("case", [*QUICK, *CASES])
def test_two_lines_of_two_pieces(four: Path, tmp_path: Path, case: str) -> None:
    check(four, tmp_path, case, {**QUICK, **CASES}[case], 4)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.distributed
@pytest.mark.parametrize("case", QUICK)
def test_four_pieces(four: Path, tmp_path: Path, case: str) -> None:
    check(four, tmp_path, f"long {case}", {**QUICK[case], "train__seq_len": 32}, 4)


HYBRID = {"inside a machine": {"train__context_parallel": 2}, "over machines": {"train__context_parallel": 4}}


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two machines with two processes each, as far as `hybrid` is told: each holds all parameters, cut in two."""
    folder = tmp_path_factory.mktemp("machines")
    settings = {"train__shard": "hybrid", "train__seq_len": 32}
    cases = {f"{case} {where}": {**QUICK[case], **HYBRID[where], **settings} for case in QUICK for where in HYBRID}
    for case in cases.values():
        case.pop("model__absolute_positions", None)
    launch(folder, [(tree(folder, name, **case), False) for name, case in cases.items()], 4, LOCAL="2")
    return folder


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("where", HYBRID)
@pytest.mark.parametrize("case", QUICK)
def test_pieces_with_parameters_cut_inside_machines(machines: Path, tmp_path: Path, case: str, where: str) -> None:
    settings = {**QUICK[case], "train__seq_len": 32}
    settings.pop("model__absolute_positions", None)
    name = f"{case} {where}"
    check(machines, tmp_path, name, settings, 4)
    held = json.loads((machines / name / "summary.json").read_text(encoding="utf-8"))
    assert held["parameters_per_process"] / held["parameters"] == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(
    ("settings", "processes", "words"),
    [
        ({}, 3, "must divide the number of processes, 3"),
        ({"train__seq_len": 25}, 2, "must divide train.seq_len = 25"),
        ({"train__seq_len": 14}, 2, "pieces of 7 tokens are shorter than model.window = 8"),
        ({"model__gradients": "block", "model__block_len": 8}, 2, "must be whole blocks of 8"),
        ({"model__per_layer": {"1": {"kind": "none"}}}, 2, "layer 1 keeps every key (kind: none)"),
        ({"model__quantizer": {"codes": 8, "start_step": 3}}, 2, "layer 0 keeps every key (until its start_step = 3)"),
        ({"train__compile": True}, 2, "train.compile"),
        ({"model__backend": "triton"}, 2, "model.backend = triton"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(tmp_path: Path, settings: dict, processes: int, words: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.context_parallel = 2: ") as refused:
        check_context(tiny_run(tmp_path, train__context_parallel=2, **settings), processes)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_one_process_refuses_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must divide the number of processes, 1"):
        run(tiny_run(tmp_path, train__context_parallel=2), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_plan_is_refused_as_the_run_would_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["train", "lm/tiny", "--dry-run", f"run_dir={tmp_path / 'run'}", "train.context_parallel=3"]
    assert command(plan) == 2
    assert "train.context_parallel = 3: must divide train.seq_len" in capsys.readouterr().err
    assert command([*plan[:-1], "train.context_parallel=2"]) == 0
