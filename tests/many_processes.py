"""Runs on several CPU processes, and what they leave behind, as numbers to compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from forked import TESTS, torchrun
from helpers import timeless
from tiny_run import tiny_run

from transformer_vq.training.checkpoints import load_tensors


def launch(folder: Path, runs: list[tuple[dict[str, Any], bool]], processes: int, **environment: str) -> None:
    """Make the runs, each a config and whether it resumes, one after another in one launch.

    environment: LOCAL and COMPILER, as training/sharded_processes.py says.
    """
    todo = folder / "runs.json"
    todo.write_text(json.dumps(runs), encoding="utf-8")
    script = TESTS / "training" / "sharded_processes.py"
    torchrun(processes, str(script), str(todo), timeout=3500 if "COMPILER" in environment else 560, **environment)


def tree(folder: Path, name: str, **settings: Any) -> dict[str, Any]:
    """The config of a tiny run, as plain values."""
    return tiny_run(folder, name, **settings).model_dump(mode="json")


def records(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every number of every training record, but times."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [timeless(line) for line in lines if line["split"] == "train"]
    names = {key for line in lines for key in line} - {"split"}
    return {name: torch.tensor([line.get(name, -1.0) for line in lines], dtype=torch.float64) for name in names}


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Of the model and its optimizer."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    return load_tensors(folder / "model.safetensors") | {
        f"optimizer {name}": tensor for name, tensor in load_tensors(folder / "model-optimizer.safetensors").items()
    }
