"""A task that fits on a page, for tests of the loop: a linear model of noisy lines, and its run config."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from helpers import timeless
from torch import Tensor, nn

from transformer_vq.config import CheckpointConfig, EvalConfig, Settings
from transformer_vq.config.run import OptimizationConfig
from transformer_vq.training import Losses, MicroBatch, Player, Task, train
from transformer_vq.training.checkpoints import load_tensors
from transformer_vq.training.step import Stepper


class ToyConfig(Settings):
    """The blocks that the loop reads."""

    seed: int = 0
    run_dir: str = "toy"
    train: OptimizationConfig = OptimizationConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


def toy_config(run_dir: Path, **train_settings: Any) -> ToyConfig:
    blocks = {
        "eval": EvalConfig(**train_settings.pop("eval", {})),
        "checkpoint": CheckpointConfig(**train_settings.pop("checkpoint", {})),
    }
    settings = {"steps": 20, "batch_size": 4, "warmup": 2, "log_every": 1, **train_settings}
    return ToyConfig(run_dir=str(run_dir), train=OptimizationConfig(**settings), **blocks)


class ToyTask(Task):
    """Regression with dropout, weighed by counts that differ from row to row. `poison` makes a loss NaN in one row."""

    unit = "images"
    primary = "mse"
    splits = ("valid",)

    def __init__(
        self, config: ToyConfig, device: torch.device, dropout: float = 0.0, poison: int | None = None
    ) -> None:
        self.config, self.device, self.poison = config, device, poison
        generator = torch.Generator().manual_seed(config.seed)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(dropout), nn.Linear(8, 1))
        for p in self.model.parameters():
            nn.init.normal_(p, generator=generator)
        self.players = {"model": Player(self.model, config.train)}
        self.steps: list[int] = []

    def describe(self) -> dict[str, str]:
        return {"data": "noise"}

    def batch(self, step: int, rows: range, slot: int) -> MicroBatch:
        self.steps.append(step)
        xs, ys, weights = zip(*(self._row(step, row) for row in rows), strict=True)
        dtype = next(self.model.parameters()).dtype
        x, y, weight = (torch.stack(t).to(dtype) for t in (xs, ys, weights))
        if self.poison == step:
            y[-1] = float("nan")
        return MicroBatch((x, y, weight), {"squares": int(weight.sum())}, len(rows), slot)

    def _row(self, step: int, row: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * step + row)
        x = torch.randn(3, generator=generator)
        return x, x.sum() + torch.randn((), generator=generator) / 10, torch.tensor(1.0 + row % 3)

    def losses(self, player: str, module: nn.Module, batch: MicroBatch) -> Losses:
        x, y, weight = batch.inputs
        square = (module(x)[:, 0] - y).square()
        return Losses({"squares": (square * weight).sum() / weight.sum()}, {"mean_x": x.mean().detach()})

    @torch.no_grad()
    def evaluate(self, split: str, final: bool) -> dict[str, Any]:
        self.model.eval()
        x, y, _ = self.batch(10**6, range(16), 0).inputs
        return {"mse": (self.model(x)[:, 0] - y).square().mean().item()}


def train_toy(
    config: ToyConfig, tasks: list[ToyTask] | None = None, quiet: bool = True, **options: Any
) -> dict[str, Any]:
    """Train; the task that was made is appended to `tasks`."""
    flags = {name: options.pop(name) for name in ("resume", "overwrite") if name in options}

    def make(accelerator: Any) -> ToyTask:
        task = ToyTask(config, accelerator.device, **options)
        (tasks if tasks is not None else []).append(task)
        return task

    return train(config, make, quiet=quiet, **flags)


def records(run_dir: Path) -> list[dict]:
    """All records, without what depends on the clock."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [timeless(json.loads(line)) for line in lines]


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    return load_tensors(folder / "model.safetensors") | load_tensors(folder / "model-optimizer.safetensors")


def interrupt_at(monkeypatch, step: int, number: int = signal.SIGINT) -> None:
    """A signal arrives as `step` begins, once."""
    make, sent = Stepper.__call__, []

    def signal_and_make(self, at):
        if at == step and not sent:
            sent.append(at)
            os.kill(os.getpid(), number)
        return make(self, at)

    monkeypatch.setattr(Stepper, "__call__", signal_and_make)
