"""What every kind with a codebook shares: when it starts, and how its commitment weight moves with the step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transformer_vq.config.quantizer import KeyQuantizer
from transformer_vq.quantizers.base import Quantized, Quantizer
from transformer_vq.quantizers.seeds import seed_number


class ScheduledQuantizer(Quantizer):
    """Knows the optimizer step. Before `start_step` keys pass unquantized; the flag `started` is kept with the weights.

    `started` is a buffer, so that a resumed or loaded model does not start again; its value is mirrored in Python,
    because reading a GPU tensor in every forward pass would wait for the GPU.
    """

    started: Tensor

    def __init__(self, config: KeyQuantizer, seed: int, layer: int, *, sees_keys_first: bool = False) -> None:
        super().__init__()
        self.config, self.seed, self.layer = config, seed, layer
        self._is_started = config.start_step == 0 and not sees_keys_first
        self.register_buffer("started", torch.tensor(int(self._is_started)))
        self.noise = torch.empty((), dtype=torch.int64, device="cpu")  # on a GPU, reading it would wait
        """Seed of the estimator's noise at this step: the same when a forward pass is recomputed."""
        self.draw = torch.empty((), dtype=torch.int64, device="cpu")
        """Seed of the choice of keys that may replace dead codes, likewise."""
        self.commit_factor = torch.ones((), dtype=torch.float64, device="cpu")
        """The schedule's factor at this step; a tensor, because a compiler would compile anew for every number."""
        self.set_step(0)

    def forward(self, k: Tensor, mask: Tensor | None = None) -> Quantized:
        """k (B, H, T, K); mask (B, T), True where a token is real. Runs in the tensors' own types, never in autocast's.

        While warming up: codes and metrics as they would be, the keys themselves as `quantized`, and no loss.
        """
        with torch.autocast(k.device.type, enabled=False):
            if not self._is_started and self.training and self.step >= self.config.start_step:
                self.initialise(k.detach(), mask)
                self.started.fill_(1)
                self._is_started = True
            result = self.quantize(k, mask)
        if self.warming_up:
            commitment = result.commitment.detach()
            return result._replace(quantized=k, loss=torch.zeros_like(commitment), commitment=commitment)
        return result

    def quantize(self, k: Tensor, mask: Tensor | None) -> Quantized:
        """What `forward` does once started."""
        raise NotImplementedError

    def initialise(self, k: Tensor, mask: Tensor | None) -> None:
        """Set up the codebook from the first keys (B, H, T, K), for kinds that do so."""

    @property
    def warming_up(self) -> bool:
        """True before `start_step`, until the first forward pass in training from then on."""
        return self.config.start_step > 0 and not self._is_started

    def set_step(self, step: int) -> None:
        """Tell the optimizer step, on which the schedule, the start and seeded noise depend."""
        self.step = step
        self.noise.fill_(seed_number(self.seed, self.layer, step, "estimator"))
        self.draw.fill_(seed_number(self.seed, self.layer, step, "candidates"))
        self.commit_factor.fill_(interpolate(self.config.commit_schedule, step))

    @property
    def beta(self) -> float:
        """Commitment weight at this step."""
        return self.config.commit * self.commit_factor.item()

    def weighted(self, commitment: Tensor) -> Tensor:
        """The commitment times its weight at this step: `commit` times the schedule's factor, linear between points."""
        if self.config.commit_schedule is None:
            return self.config.commit * commitment
        return (self.config.commit * self.commit_factor).to(commitment.dtype) * commitment

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.wake()

    def wake(self) -> None:
        """See the base."""
        self._is_started = bool(self.started.item())


def interpolate(points: list[tuple[int, float]] | None, step: int) -> float:
    """Piecewise linear through (step, factor) points, constant outside; 1 without points."""
    if not points:
        return 1.0
    before = [p for p in points if p[0] <= step]
    after = [p for p in points if p[0] > step]
    if not before or not after:
        return (before[-1] if before else after[0])[1]
    (a, x), (b, y) = before[-1], after[0]
    return x + (y - x) * (step - a) / (b - a)
