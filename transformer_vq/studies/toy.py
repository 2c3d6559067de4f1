"""The toy task: the smallest thing in which an estimator can help or hurt. A run takes seconds.

    x = centre of a random cluster + noise,   k = scale · encoder(x) + shift,   x̂ = decoder((k̂ − shift)/scale)
    loss = mean (x̂ − x)² + the quantizer's own

The scale makes codes short or long beside the keys, the shift moves the keys away from the origin; neither changes what
the network could represent, so that a difference is the estimator's or the lookup's doing.

Axes:   N points  D width of a point  K key width
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from transformer_vq.config.quantizer import NoneConfig
from transformer_vq.config.toy import ToyConfig, ToyRunConfig
from transformer_vq.quantizers import build_quantizer
from transformer_vq.quantizers.health import batch_health, code_counts
from transformer_vq.quantizers.losses import squared_distance
from transformer_vq.training import Losses, MicroBatch, Player, Task, train


class ToyAutoencoder(nn.Module):
    """Points in, points out, through one quantized key."""

    def __init__(self, config: ToyConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = _mlp(config.dim, config.hidden, config.key_dim)
            self.decoder = _mlp(config.key_dim, config.hidden, config.dim)
        self.quantizer = build_quantizer(config.quantizer, 1, config.key_dim, seed=seed)

    def keys(self, x: Tensor) -> Tensor:
        """(N, D) -> (1, 1, N, K)."""
        keys: Tensor = self.config.key_scale * self.encoder(x)[None, None] + self.config.shift
        return keys

    def points(self, k: Tensor) -> Tensor:
        """Decoded keys, (1, 1, N, K) -> (N, D)."""
        points: Tensor = self.decoder((k[0, 0] - self.config.shift) / self.config.key_scale)
        return points

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x (N, D) -> mean squared error, the quantizer's own loss, codebook health."""
        result = self.quantizer(self.keys(x))
        return (self.points(result.quantized) - x).square().mean(), result.loss, result.metrics


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, outputs)
    )


class ToyTask(Task):
    """Trains a `ToyAutoencoder` by a `ToyRunConfig`."""

    unit = "points"
    primary = "mse"

    def __init__(self, config: ToyRunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.points = mixture(config.toy, config.seed, device)
        self.model = ToyAutoencoder(config.toy, config.seed)
        starts_late = getattr(config.toy.quantizer, "start_step", 0) > 0
        self.players = {"model": Player(self.model, config.train, partly_used=starts_late)}

    def batch(self, step: int, rows: range, slot: int) -> MicroBatch:
        """Rows of the step's batch, drawn from the training points."""
        draw = np.random.default_rng([self.config.seed, 1, step])
        chosen = draw.integers(len(self.points["train"]), size=self.config.train.batch_size)[rows.start : rows.stop]
        x = self.points["train"][torch.as_tensor(chosen, device=self.device)]
        return MicroBatch(x, {"mse": len(x), "quantizer": len(x)}, len(x), slot)

    def losses(self, player: str, module: nn.Module, batch: MicroBatch) -> Losses:
        """Reconstruction, and the quantizer's own loss."""
        error, own, metrics = module(batch.inputs)
        return Losses({"mse": error, "quantizer": own}, metrics)

    def set_step(self, step: int) -> None:
        """Quantizers have schedules and warm-ups."""
        self.model.quantizer.set_step(step)

    def set_rows(self, first_row: int) -> None:
        """The points of a batch are one row of keys to the quantizer."""
        self.model.quantizer.set_rows(0, first_row)

    def after_update(self, player: str) -> None:
        """Once per optimizer step."""
        self.model.quantizer.apply_codebook_statistics()

    def report(self, player: str, losses: Mapping[str, float]) -> dict[str, float]:
        """Reconstruction alone."""
        return {"mse": losses["mse"]}

    @torch.no_grad()
    def evaluate(self, split: str, final: bool) -> dict[str, Any]:
        """Mean squared error, and codebook health over the whole split."""
        model, x = self.model.eval(), self.points[split]
        k = model.keys(x)
        result = model.quantizer(k)
        error = (model.points(result.quantized) - x).square().mean()
        values = {"mse": error.item(), "key_norm": k.norm(dim=-1).mean().item()}
        config = self.config.toy.quantizer
        if isinstance(config, NoneConfig):
            return values
        size = config.size
        counts = code_counts(result.codes, size, None)
        distance = squared_distance(k, result.quantized)
        health = batch_health(k, result.quantized, distance, counts, None)
        # of the reconstruction's own scale, so that runs of different `key_scale` compare
        health["quantization_error"] = distance.mean() / (self.config.toy.key_scale**2)
        return values | {"codes": size} | {name: value.item() for name, value in health.items()}

    def describe(self) -> dict[str, str]:
        """What is about to be trained."""
        toy = self.config.toy
        return {
            "data": f"{toy.clusters} Gaussian clusters in {toy.dim} dimensions",
            "model": f"autoencoder through one key of {toy.key_dim} numbers, quantizer {toy.quantizer.kind}",
        }


def mixture(config: ToyConfig, seed: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Points (N, D) of each split, from one mixture that depends on the seed alone."""
    draw = np.random.default_rng([seed, 0])
    centres = draw.standard_normal((config.clusters, config.dim))
    sizes = {"train": config.train_points, "valid": config.test_points, "test": config.test_points}
    return {
        split: torch.as_tensor(
            centres[draw.integers(config.clusters, size=n)] + config.noise * draw.standard_normal((n, config.dim)),
            dtype=torch.float32,
            device=device,
        )
        for split, n in sizes.items()
    }


def run(config: ToyRunConfig, resume: bool = False, overwrite: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train the toy that `config` describes and return its summary; see `training.train` for the rules and errors."""

    def make(accelerator: Accelerator) -> ToyTask:
        return ToyTask(config, accelerator.device)

    return train(config, make, resume, overwrite, quiet)
