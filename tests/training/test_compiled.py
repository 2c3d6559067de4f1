"""`train.compile`: the model is one graph, and trains as without; a graph break is an error here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import assert_same
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
