"""Contestants take turns in one process, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)
Spread = tuple[float, float, float]
"""Lower quartile, median, upper quartile."""


QUEUED = 5
"""Steps of a turn on a GPU, launched one behind the other: the first one's launches alone would be waited for."""
LONG = 0.05
"""Seconds of a step beyond which the launches do not matter, and one is enough."""


def in_turns(
    contest: Mapping[Name, Callable[[], object]], repeats: int, device: str, warmup: int = 2
) -> dict[Name, list[float]]:
    """Seconds of a step in each of `repeats` turns, by contestant; `warmup` turns before them are not counted."""
    seconds: dict[Name, list[float]] = {name: [] for name in contest}
    for turn in range(warmup + repeats):
        for name, step in contest.items():
            before = seconds[name][-1] if turn else LONG
            seconds[name].append(timed(step, device, QUEUED if device == "cuda" and before < LONG else 1))
    return {name: found[warmup:] for name, found in seconds.items()}


def timed(step: Callable[[], object], device: str, queued: int = 1) -> float:
    """Seconds that a step takes, of so many one behind the other."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(queued):
        step()
    _wait(device)
    return (time.perf_counter() - start) / queued


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """How many times as long theirs takes, turn by turn: quartiles and median."""
    return quartiles([a / b for a, b in zip(theirs, ours, strict=True)])


def spread(median: str, low: str, high: str, found: Spread) -> dict[str, float]:
    """The three of them by these names."""
    return {median: found[1], low: found[0], high: found[2]}


def quartiles(found: Sequence[float]) -> Spread:
    """Of one or more numbers."""
    if len(found) == 1:
        return found[0], found[0], found[0]
    low, median, high = statistics.quantiles(found, n=4, method="inclusive")
    return low, median, high
