"""What a person sees of a run, on standard error: the first screen, one line of progress, messages.

On a terminal a bar with loss, bits per byte, speed, MFU and time left; elsewhere a plain line now and then. Only the
main process shows anything.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

PLAIN_EVERY = 10.0  # seconds between plain lines


class Progress:
    """Shows how far a run is; `quiet` shows nothing at all."""

    def __init__(self, steps: int, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.steps = steps
        self.bar: Bar | None = None
        self._shown = self._start = time.monotonic()
        self._first = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def announce(self, lines: Mapping[str, str]) -> None:
        """The first screen: what is about to happen."""
        width = max(map(len, lines)) + 2
        for heading, line in lines.items():
            self.console.print(f"[bold]{heading:<{width}}[/bold]", end="")
            self.console.print(line, markup=False, soft_wrap=True)

    def begin(self, step: int) -> None:
        """Training starts after `step` steps."""
        self._first, self._start = step, time.monotonic()
        if self.console.is_terminal and not self.console.quiet:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"),
            )
            self.bar = Bar(*columns, TimeRemainingColumn(), console=self.console)
            self.bar.start()
            self.bar.add_task("", total=self.steps, completed=step, text="")

    def update(self, step: int, values: Mapping[str, float], unit: str) -> None:
        """One step is done."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step, text=_line(values, unit))
            return
        now = time.monotonic()
        if now - self._shown >= PLAIN_EVERY or step == self.steps:
            self._shown = now
            left = (now - self._start) / max(1, step - self._first) * (self.steps - step)
            self.say(f"step {step}/{self.steps}  {_line(values, unit)}  {timedelta(seconds=round(left))} left")

    def say(self, text: str) -> None:
        """A message on a line of its own."""
        self.console.print(text, markup=False, soft_wrap=True)

    def evaluated(self, step: int, split: str, values: Mapping[str, Any], primary: str) -> None:
        """An evaluation is done."""
        self.say(f"step {step}/{self.steps}  {split} {primary.replace('_', ' ')} {values[primary]:.4f}")


def _line(values: Mapping[str, float], unit: str) -> str:
    parts = [f"loss {values['loss']:.4f}"]
    if "bits_per_byte" in values:
        parts.append(f"bits per byte {values['bits_per_byte']:.4f}")
    reader = f" (reader {values['cost/read_per_s']:,.0f})" if "cost/read_per_s" in values else ""
    parts.append(f"{values[f'{unit}_per_s']:,.0f} {unit}/s{reader}")
    if "cost/mfu" in values:
        parts.append(f"MFU {values['cost/mfu']:.0%}")
    return "  ".join(parts)
