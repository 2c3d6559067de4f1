"""How commands talk: a console for people, one JSON object for programs, one line for an error.

What a stream cannot show is replaced, set once for every command by `settle_streams`. Text is text: names that look
like rich's markup, or that would steer a terminal, are shown as they are written; what is styled says so (`styled`).
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text


class Failure(Exception):
    """Something expected went wrong that is not the user's input: one line, exit code 1."""


def settle_streams() -> None:
    """Standard output and error replace what their encoding lacks; one that is closed leads nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # as long as the process
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def flush_output() -> str | None:
    """Write out what is left; the reason in words when nobody takes it (`| head`) or nothing holds it (a full disk).

    A stream that failed is turned to nowhere, so that the interpreter's own last flush is silent.
    """
    reason = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            reason = error.strerror or str(error)
            silence(stream)
    return reason


def silence(stream: Any) -> None:
    """Turn a stream that cannot be written to any more to nowhere, what it still holds included."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    finally:
        os.close(nowhere)


def main_process() -> bool:
    """False in all processes but the first of a launcher (torchrun, accelerate): those print nothing."""
    return os.environ.get("RANK", "0") == "0"


def console(to_stderr: bool = False, quiet: bool = False) -> Console:
    """Text for people; `to_stderr` when standard output is kept for JSON. Wide in a pipe, so that tables stay whole."""
    stream = sys.stderr if to_stderr else sys.stdout
    width = None if stream.isatty() else 200
    quiet = quiet or not main_process()
    return Console(file=stream, quiet=quiet, width=width, highlight=False, soft_wrap=False, markup=False, emoji=False)


def print_json(value: Any) -> None:
    """One JSON object on standard output, ASCII whatever the encoding; NaN and infinity, which JSON lacks, are null."""
    if main_process():
        print(json.dumps(_finite(value), allow_nan=False))


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


class PlainTable(Table):
    """A table whose strings are text, never markup."""

    def add_row(self, *cells: RenderableType | None, **style: Any) -> None:
        super().add_row(*(Text(printable(cell)) if isinstance(cell, str) else cell for cell in cells), **style)


def table(*columns: str, title: str | None = None) -> PlainTable:
    """A plain table: first column to the left, the others, numbers mostly, to the right."""
    heading = None if title is None else Text(printable(title))
    out = PlainTable(
        title=heading, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for i, name in enumerate(columns):
        out.add_column(Text(printable(name)), justify="right" if i else "left", header_style="dim")
    return out


def styled(markup: str) -> Text:
    """Text in rich's markup, for words of our own."""
    return Text.from_markup(markup, emoji=False)


def printable(text: str) -> str:
    """Without what would steer a terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def print_lines(out: Console, lines: Mapping[str, str]) -> None:
    """Heading and text, a line each."""
    width = max(map(len, lines)) + 2
    for heading, text in lines.items():
        out.print(Text(f"{heading:<{width}}", "bold"), end="")
        out.print(printable(text), soft_wrap=True)


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
