"""Peaks of real steps, by PyTorch's own record of what it allocates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from transformer_vq.ops.attention import blocks
from transformer_vq.training.step import Stepper


def allocated(step: Callable[[], object]) -> int:
    """The most bytes that exist at once while `step` runs, beyond what was there."""
    blocks._lasting.__dict__.clear()  # scratch memory that stays from call to call is part of the peak
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        step()
    now = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def sizes(tensors: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(x.nbytes for x in tensors)


def peaks_of_steps(monkeypatch: Any) -> list[int]:
    """A list to which every training step from here on adds its peak, with all that was there before it."""
    found: list[int] = []
    step = Stepper.__call__

    def held(self: Stepper) -> int:
        modules = [player.module for player in self.task.players.values()]
        total = sizes(self.task.carried().values())
        total += sum(sizes(optimizers.state().values()) for optimizers in self.optimizers.values())
        for module in modules:  # no tensor stays in a name: the step frees gradients
            total += sizes(module.parameters()) + sizes(module.buffers())
            total += sizes(p.grad for p in module.parameters() if p.grad is not None)
        return total

    def measured(self: Stepper, at: int) -> Any:
        out: list[Any] = []
        before = held(self)
        found.append(before + allocated(lambda: out.append(step(self, at))))
        return out[0]

    monkeypatch.setattr(Stepper, "__call__", measured)
    return found
