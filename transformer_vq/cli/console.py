"""How commands talk: a console for people, one JSON object for programs, one line for an error."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table


class Failure(Exception):
    """Something expected went wrong that is not the user's input: one line, exit code 1."""


def main_process() -> bool:
    """False in all processes but the first of a launcher (torchrun, accelerate): those print nothing."""
    return os.environ.get("RANK", "0") == "0"


def console(to_stderr: bool = False, quiet: bool = False) -> Console:
    """Text for people; `to_stderr` when standard output is kept for JSON. Wide in a pipe, so that tables stay whole."""
    stream = sys.stderr if to_stderr else sys.stdout
    width = None if stream.isatty() else 200
    return Console(file=stream, quiet=quiet or not main_process(), width=width, highlight=False, soft_wrap=False)


def print_json(value: Any) -> None:
    """One JSON object on standard output; NaN and infinity, which JSON lacks, become null."""
    if main_process():
        print(json.dumps(_finite(value), ensure_ascii=False))


def print_error(message: str) -> None:
    """`error: …` on standard error, in one line."""
    print("error:", " ".join(message.split()), file=sys.stderr)


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, gone when it is done; yields what moves it: (done, total)."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    out = console(to_stderr=True)
    if not out.is_terminal:
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table: first column to the left, the others, numbers mostly, to the right."""
    out = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, name in enumerate(columns):
        out.add_column(name, justify="right" if i else "left", header_style="dim")
    return out


def print_lines(out: Console, lines: Mapping[str, str]) -> None:
    """Heading and text, a line each."""
    width = max(map(len, lines)) + 2
    for heading, text in lines.items():
        out.print(f"[bold]{heading:<{width}}[/bold]", end="")
        out.print(text, markup=False, soft_wrap=True)


def number(value: float | int | None, digits: int = 4) -> str:
    """A number as a reader wants it: 1,234,567 or 1.873; - where there is none."""
    if value is None:
        return "-"
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    return f"{value:,.0f}" if 10**digits <= abs(value) < 1e9 else f"{value:.{digits}g}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
