"""What benchmarks of several sizes have in common: their rows, and the table and the lines that are made of them.

A row is one size:

    AXIS                        the size
    milliseconds, low, high     of ours: median and quartiles over turns
    gflop, mib                  what ours must compute and move, by `work.py`: the roofline
    others                      by name the same three, and ratio, ratio_low, ratio_high: how many times as long as ours
                                it takes, turn by turn; or absent, why it took no part
    …                           more of the benchmark's own
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from transformer_vq.bench.device import Ceilings
from transformer_vq.bench.turns import Name, quartiles, ratios, spread
from transformer_vq.bench.work import Work

Row = dict[str, Any]
Step = Callable[[], object]
Cells = tuple[str, ...]
OURS = "ours"
TIME = ("milliseconds", "low", "high")
RATIO = ("ratio", "ratio_low", "ratio_high")


def row(
    axis: str, size: int, seconds: Mapping[str, Sequence[float]], needed: Work, absent: Mapping[str, str], **more: Any
) -> Row:
    """seconds: of each turn, by name, `OURS` among them."""
    ours = seconds[OURS]
    others: dict[str, Row] = {name: {"absent": why} for name, why in absent.items()}
    others |= {
        name: _time(theirs) | spread(*RATIO, ratios(theirs, ours)) for name, theirs in seconds.items() if name != OURS
    }
    counted = {"gflop": needed.flops / 1e9, "mib": needed.bytes / 2**20}
    return {axis: size, **_time(ours), **counted, **more, "others": others}


def _time(seconds: Sequence[float]) -> Row:
    return spread(*TIME, quartiles([1e3 * t for t in seconds]))


def able(make: Callable[[], Step | str]) -> Step | str:
    """A step that has run once, or in one line why it cannot."""
    try:
        step = make()
        if not isinstance(step, str):
            step()
    except Exception as error:  # whatever it is in other people's code, from a lack of memory to a compiler's fault
        return f"fails here: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return step


def apart(made: Mapping[Name, Step | str]) -> tuple[dict[Name, Step], dict[Name, str]]:
    """The steps, and why others are absent."""
    steps: dict[Name, Step] = {name: x for name, x in made.items() if not isinstance(x, str)}
    return steps, {name: x for name, x in made.items() if isinstance(x, str)}


def absent(rows: Iterable[Row]) -> dict[str, str]:
    """Who took no part in some row, and why."""
    return {name: other["absent"] for r in rows for name, other in r["others"].items() if "absent" in other}


def lines(rows: Sequence[Row], axis: str) -> dict[str, list[tuple[float, float, float, float]]]:
    """For the picture, by implementation: size, and lower quartile, median and upper quartile in seconds."""
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for r in rows:
        for name, its in _sides(r):
            low, median, high = its["low"] / 1e3, its["milliseconds"] / 1e3, its["high"] / 1e3
            found.setdefault(name, []).append((r[axis], low, median, high))
    return found


def floor(rows: Sequence[Row], axis: str, ceilings: Ceilings) -> list[tuple[float, float]]:
    """Size, and the least seconds that ours could take."""
    return [(r[axis], Work(1e9 * r["gflop"], 2**20 * r["mib"]).seconds(*ceilings)) for r in rows]


def cells(rows: Sequence[Row], axis: str, more: Mapping[str, tuple[str, str]]) -> tuple[Cells, list[Cells]]:
    """Headings, and a line each size and implementation. more: key -> heading and format, of numbers that any side may
    have; what nobody has is left out.
    """
    sides = [(r[axis], name, its) for r in rows for name, its in _sides(r)]
    more = {key: x for key, x in more.items() if any(its.get(key) is not None for _, _, its in sides)}
    headings = (axis.replace("_", " "), "", "ms", "quartiles", "× ours", "quartiles")
    found = []
    for size, name, its in sides:
        times = number(its["milliseconds"]), f"{number(its['low'])} - {number(its['high'])}"
        ratio = (
            (f"{its['ratio']:.2f}", f"{its['ratio_low']:.2f} - {its['ratio_high']:.2f}") if "ratio" in its else ("", "")
        )
        own = ("" if its.get(key) is None else format(its[key], form) for key, (_, form) in more.items())
        found.append((f"{size:,}", name, *times, *ratio, *own))
    return headings + tuple(heading for heading, _ in more.values()), found


def number(x: float) -> str:
    """With three digits or more."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 0.1 else f"{x:.4f}"


def _sides(r: Row) -> Iterator[tuple[str, Row]]:
    yield OURS, {key: value for key, value in r.items() if key != "others"}
    yield from ((name, other) for name, other in r["others"].items() if "absent" not in other)


def peak_on_gpu(step: Step) -> float:
    """MiB that one step allocates at most, beside what is there already."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
