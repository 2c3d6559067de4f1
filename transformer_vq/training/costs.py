"""What a run costs while it runs, for its records, first screen and summary; of the main process where nothing is said.

cost/seconds          wall clock since the training record before
cost/data             of it, waiting for a batch that was not read yet
cost/communication    waiting for other processes: sums, messages, and gradients not hidden behind the backward pass
cost/evaluation       evaluating, the wait for others and the best checkpoint left out
cost/checkpoint       writing checkpoints
cost/mfu              share of the devices' peak that the model's own operations make, over the steps since that record
cost/peak_bytes       most memory so far: of tensors on a GPU, of the whole process on a CPU
cost/read_per_s       tokens (or images) that all processes' readers could have delivered a second

What cannot be measured is left out: `communication` of one process, under `train.shard`, and on a GPU of all but
gradients, of steps in one pass; `mfu` of a model whose operations nobody counts.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator

from transformer_vq.clock import Clock
from transformer_vq.config.run import OptimizationConfig
from transformer_vq.machine import peak_resident
from transformer_vq.training.peak import Peak, peak
from transformer_vq.training.reader import Reader

PREFIX = "cost/"
TIMES = ("data", "evaluation", "checkpoint")
TALK = ("communication", "gradients")
"""What is waited for by this thread, and what DDP says of itself."""


class Costs:
    """One run's; `clock` is to run while it does."""

    def __init__(
        self,
        unit: str,
        flops_per_unit: float | None,
        train: OptimizationConfig,
        accelerator: Accelerator,
        reader: Reader,
        unseen: bool,
    ) -> None:
        """unseen: processes talk within forward and backward passes where no clock of ours looks."""
        self.unit, self.flops, self.precision = unit, flops_per_unit, train.precision
        self.device, self.processes, self.reader = accelerator.device, accelerator.num_processes, reader
        self.peak: Peak | None = None
        if flops_per_unit is not None:
            self.peak = peak(self.device, train.precision)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.clock = Clock((*TIMES, *talk(self.device, self.processes, unseen)))
        self._read = (0, 0.0)

    def first_screen(self) -> dict[str, str]:
        """A line of what is about to be done, and by what."""
        if self.flops is None or self.peak is None:
            return {}
        made = f"{self.flops / 1e6:,.1f} MFLOPs a {self.unit.removesuffix('s')}, forward and backward"
        each = " each" if self.processes > 1 else ""
        return {
            "work": f"{made}; peak {self.peak.flops / 1e9:,.0f} GFLOP/s{each} in {self.precision}, {self._source()}"
        }

    def lap(self, pace: float) -> dict[str, float]:
        """What the time since the last lap went into, for a record; pace: units a second over its steps."""
        found = {**_named(*self.clock.lap()), "peak_bytes": self.peak_bytes()}
        if (share := self.mfu(pace)) is not None:
            found["mfu"] = share
        units, seconds = self.reader.units - self._read[0], self.reader.seconds - self._read[1]
        self._read = self.reader.units, self.reader.seconds
        if seconds > 0:
            found["read_per_s"] = units / seconds * self.processes
        return {PREFIX + name: value for name, value in found.items()}

    def summary(self, recorded: dict[str, float], pace: float, peak_bytes: int) -> dict[str, float | str]:
        """Seconds of the whole run, those of its records and since; pace: since it was last started."""
        rest = _named(*self.clock.read())
        found: dict[str, float | str] = {n: recorded.get(PREFIX + n, 0.0) + seconds for n, seconds in rest.items()}
        found["peak_bytes"] = peak_bytes
        if self.flops is not None and self.peak is not None and (share := self.mfu(pace)) is not None:
            found |= {"mfu": share, f"flops_per_{self.unit.removesuffix('s')}": self.flops}
            found |= {"peak_flops": self.peak.flops, "peak_from": self.peak.source}
        return found

    def mfu(self, pace: float) -> float | None:
        """Share of the peak of all processes' devices, at so many units a second; None where it is not known."""
        if self.flops is None or self.peak is None:
            return None
        return float(self.flops * pace / (self.peak.flops * self.processes))

    def peak_bytes(self) -> int:
        """The most memory until now."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return peak_resident()

    def _source(self) -> str:
        assert self.peak is not None
        return "measured here" if self.peak.source == "measured" else "by its data sheet"


def talk(device: torch.device, processes: int, unseen: bool) -> tuple[str, ...]:
    """The parts of TALK that can be told: on a GPU, to wait for a sum is to wait for all work before it."""
    if processes == 1 or unseen:
        return ()
    return ("gradients",) if device.type == "cuda" else TALK


def _named(seconds: float, parts: dict[str, float]) -> dict[str, float]:
    """As records call them."""
    spoken = {name: parts[name] for name in TALK if name in parts}
    shared = {"communication": sum(spoken.values())} if spoken else {}
    return {"seconds": seconds, **{name: parts[name] for name in TIMES}, **shared}
