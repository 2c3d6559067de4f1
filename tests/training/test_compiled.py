"""`train.compile`: the model is one graph, and trains as without; a graph break is an error here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_same
from many_processes import launch, tree
from tiny_run import tiny_run

from transformer_vq.training import run
from transformer_vq.training.checkpoints import load_tensors

EVERYTHING = {
    "model__layers": 1,
    "train__precision": "fp64",
    "train__steps": 6,
    "train__micro_batch": 1,
    "model__checkpoint_activations": True,
    "model__quantizer": {"codes": 8, "init": "kmeans", "dead_code_threshold": 10.0, "ema": 0.8},
    "eval__every": 3,
}


def one_graph(module: torch.nn.Module) -> None:
    """In place of `Module.compile`: inductor takes minutes, and a graph break would pass in silence."""
    module._compiled_call_impl = torch.compile(module._call_impl, fullgraph=True, backend="aot_eager")


def weights(folder: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_tensors(folder / "checkpoints" / f"step-{step:08}" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_grouped_first_codebooks_dead_codes_accumulation_and_checkpointing(tmp_path, monkeypatch, capsys):
    run(tiny_run(tmp_path, "eager", **EVERYTHING), quiet=True)
    monkeypatch.setattr(torch.nn.Module, "compile", one_graph)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run(tiny_run(tmp_path, "compiled", train__compile=True, **EVERYTHING))
    counted = torch._dynamo.utils.counters
    assert not counted["graph_break"] and counted["stats"]["unique_graphs"] == 2  # the first micro-batch, and the next
    assert_same(weights(tmp_path / "compiled"), weights(tmp_path / "eager"), rtol=1e-9)
    screen = capsys.readouterr().err
    assert "compile " in screen and "step 1: " in screen and "compiling included" in screen


SHARED = {"train__compile": True, "train__steps": 4}
PLAIN = {**SHARED, "model__checkpoint_activations": False}
PROCESSES = {  # what each is told, how many graphs it makes (the first micro-batch, and the next), are they whole
    "added up": (SHARED, 2, True),
    "cut up": ({**PLAIN, "train__shard": "full", "model__layers": 2}, 2, True),
    "cut up, checkpointed": ({**SHARED, "train__shard": "full"}, None, False),
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(3600)
def test_two_processes_compile_and_train_as_one_that_does_not(tmp_path):
    two = {name: EVERYTHING | settings for name, (settings, _, _) in PROCESSES.items()}
    launch(tmp_path, [(tree(tmp_path, name, **case), False) for name, case in two.items()], 2, COMPILER="aot_eager")
    for name, (_, graphs, whole) in PROCESSES.items():
        alone = {**two[name], "train__compile": False, "train__shard": "none"}
        run(tiny_run(tmp_path, f"{name}, alone", **alone), quiet=True)
        assert_same(weights(tmp_path / name, 4), weights(tmp_path / f"{name}, alone", 4), rtol=1e-9)
        counted = json.loads((tmp_path / name / "graphs.json").read_text(encoding="utf-8"))
        assert bool(counted["breaks"]) != whole and graphs in (None, counted["graphs"])
