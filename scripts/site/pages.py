"""Pages that are made from the package itself: every setting with its default and meaning, every command's help.

A page under docs/ says where: the line `<!-- settings MODULE:CLASS -->` is replaced by a table, `<!-- commands -->` by
what `--help` prints.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from importlib import import_module
from typing import Any

MARK = re.compile(r"^<!-- (settings|commands)(?: (\S+))? -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called for each page's Markdown."""
    return MARK.sub(lambda found: settings(found[2]) if found[1] == "settings" else commands(), markdown)


def settings(name: str) -> str:
    """The table of one settings class, `module:Class`."""
    module, _, attribute = name.partition(":")
    rows = ["| key | default | what |", "|---|---|---|"]
    for key, field in getattr(import_module(module), attribute).model_fields.items():
        meaning = re.sub(r"([|\[\]<*_])", r"\\\1", field.description or "")
        rows.append(f"| `{key}` | {default(field)} | {meaning}{bounds(field)} |")
    return "\n".join(rows)


def default(field: Any) -> str:
    """The default as YAML has it; a block's stands in a table of its own."""
    value = field.get_default(call_default_factory=True)
    if field.is_required():
        return "needed"
    if hasattr(value, "model_dump"):
        return "its block's"
    return f"`{str(value).lower() if isinstance(value, bool) else 'null' if value is None else value}`"


def bounds(field: Any) -> str:
    """The bounds in brackets, as in ` (≥ 1, < 2)`."""
    signs = {"ge": "≥", "gt": "&gt;", "le": "≤", "lt": "&lt;"}
    found = [f"{sign} {getattr(m, a):g}" for m in field.metadata for a, sign in signs.items() if hasattr(m, a)]
    return f" ({', '.join(found)})" if found else ""


def commands() -> str:
    """The help of every command, as a terminal of 100 columns shows it."""
    os.environ.update(COLUMNS="100", TERM="dumb", NO_COLOR="1")
    from transformer_vq.cli import run
    from transformer_vq.cli.examples import EXAMPLES

    out = []
    for words in (name.split() for name in EXAMPLES):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            run([*words, "--help"])
        title = " ".join(["transformer-vq", *words])
        out.append(f"## `{title}`\n\n```text\n{said.getvalue().strip()}\n```")
    return "\n\n".join(out)
