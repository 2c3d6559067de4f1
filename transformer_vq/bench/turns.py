"""Contestants take turns in one process, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Spread = tuple[float, float, float]
"""Lower quartile, median, upper quartile."""


def in_turns(
    contest: Mapping[str, Callable[[], object]], repeats: int, device: str, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each of `repeats` turns, by contestant; `warmup` turns before them are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contest}
    for turn in range(repeats + warmup):
        for name, step in contest.items():
            spent = timed(step, device)
            if turn >= warmup:
                seconds[name].append(spent)
    return seconds


def timed(step: Callable[[], object], device: str) -> float:
    """Seconds that one step takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """How many times as long theirs takes, turn by turn: quartiles and median."""
    return quartiles([a / b for a, b in zip(theirs, ours, strict=True)])


def quartiles(found: Sequence[float]) -> Spread:
    """Of one or more numbers."""
    if len(found) == 1:
        return found[0], found[0], found[0]
    low, median, high = statistics.quantiles(found, n=4, method="inclusive")
    return low, median, high
