"""What every kind with a codebook shares: when it starts, and how its commitment weight moves with the step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transformer_vq.config.quantizer import KeyQuantizer
from transformer_vq.ops.estimators.noise import Noise, named
from transformer_vq.quantizers.base import Quantized, Quantizer
from transformer_vq.quantizers.reservoir import Reservoir
from transformer_vq.quantizers.seeds import seed_number


class Gathered(Exception):  # not an error: ends a forward pass that has done what it was for
    """The quantizer that gathers keys has seen those of this forward pass."""


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
        """Seed of the noise at this step, and of the choice of keys: the same when a forward pass is recomputed."""
        self.commit_factor = torch.ones((), dtype=torch.float64, device="cpu")
        """The schedule's factor at this step; a tensor, because a compiler would compile anew for every number."""
        self.first_row, self.first_place = (torch.zeros((), dtype=torch.int64, device="cpu") for _ in range(2))
        self._gathering: Reservoir | None = None
        self.set_step(0)

    def forward(self, k: Tensor, mask: Tensor | None = None) -> Quantized:
        """k (B, H, T, K); mask (B, T), True where a token is real. Runs in the tensors' own types, never in autocast's.

        While warming up: codes and metrics as they would be, the keys themselves as `quantized`, and no loss.
        """
        with torch.autocast(k.device.type, enabled=False):
            if self._gathering is not None:
                self._gathering.add(k.detach(), mask, self.names(k, mask))
                raise Gathered
            if self.training and self.due:
                self._start(k.detach(), mask)
            result = self.quantize(k, mask)
        if self.warming_up:
            commitment = result.commitment.detach()
            return result._replace(quantized=k, loss=torch.zeros_like(commitment), commitment=commitment)
        return result

    def quantize(self, k: Tensor, mask: Tensor | None) -> Quantized:
        """What `forward` does once started."""
        raise NotImplementedError

    @property
    def due(self) -> bool:
        """True from `start_step` on, until the codebook stands."""
        return not self._is_started and self.step >= self.config.start_step

    def _start(self, k: Tensor, mask: Tensor | None) -> None:
        """A first forward pass in training that no loop has prepared: its keys alone make the codebook."""
        first = Reservoir(self.first_keys)
        first.add(k, mask, self.names(k, mask))
        self.begin(first.keys(k))

    def gather(self) -> None:
        """From now on a forward pass leaves its keys and ends with `Gathered`, until `finish_gathering`."""
        self._gathering = Reservoir(self.first_keys)

    def finish_gathering(self) -> None:
        """Set up the codebook from the keys that all processes gathered. Every process must call it."""
        gathered, self._gathering = self._gathering, None
        assert gathered is not None
        self.begin(gathered.join())

    @torch.no_grad()
    def begin(self, keys: Tensor) -> None:
        """Start, with a codebook from the keys (H, N, K)."""
        self.initialise(keys)
        self.started.fill_(1)
        self._is_started = True

    @property
    def first_keys(self) -> int:
        """How many keys a head the first codebook is made from, at most: of all, those that a hash of (seed, step, row,
        place) puts first, so that a batch may be cut at will."""
        return 0

    def initialise(self, keys: Tensor) -> None:
        """Set up the codebook from the first keys (H, N, K), for kinds that do so."""

    def names(self, k: Tensor, mask: Tensor | None) -> Noise:
        """Names for random numbers of keys (B, H, T, K) in this step; see ops/estimators/noise.py."""
        return named(self.noise, self.first_row, self.first_place, k, mask)

    def set_rows(self, first_row: int | Tensor, first_place: int | Tensor = 0) -> None:
        """See the base."""
        self.first_row.fill_(first_row)
        self.first_place.fill_(first_place)

    @property
    def warming_up(self) -> bool:
        """True before `start_step`, until the first forward pass in training from then on."""
        return self.config.start_step > 0 and not self._is_started

    def set_step(self, step: int) -> None:
        """Tell the optimizer step, on which the schedule, the start and seeded noise depend."""
        self.step = step
        self.noise.fill_(seed_number(self.seed, self.layer, step, "estimator"))
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
