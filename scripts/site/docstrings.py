"""Docstrings as pages show them: columns of `name   meaning` as tables, `@taking` functions with their real arguments.

A docstring is Markdown already: sentences, and formulas set in by four more spaces. Only columns would run together.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension, Function, Parameter, ParameterKind, Parameters

ENTRY = re.compile(r"^(\w+(?:, \w+)*) {2,}(\S.*)$")


class Docstrings(Extension):
    """Called by griffe for each object that it reads from the source."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Columns to tables, in every docstring."""
        if obj.docstring:
            obj.docstring.value = with_tables(obj.docstring.value)

    def on_package(self, *, pkg: Any, **_: Any) -> None:
        """`@taking(Arguments) def f(x: Arguments)` is called with the fields of `Arguments`."""
        for module in list(pkg.modules.values()):
            unfold(module)


def unfold(module: Any) -> None:
    """Show the fields of its one parameter as the parameters of each function under `@taking`."""
    for member in module.members.values():
        if member.is_alias:
            continue
        if member.is_module:
            unfold(member)
        elif isinstance(member, Function) and any(str(d.value).startswith("taking(") for d in member.decorators):
            fields = module[member.parameters[0].annotation.name]
            member.parameters = Parameters(*parameters(fields))


def parameters(fields: Class) -> list[Parameter]:
    """The fields of a dataclass as parameters, in order; those after `_: KW_ONLY` go by keyword."""
    kind, out = ParameterKind.positional_or_keyword, []
    for name, field in fields.attributes.items():
        if name == "_":
            kind = ParameterKind.keyword_only
        elif field.annotation is not None:
            out.append(Parameter(name, kind=kind, annotation=field.annotation, default=field.value))
    return out


def with_tables(text: str) -> str:
    """`text` with each block of lines `name   meaning`, continued on lines that are set in, as a Markdown table."""
    out: list[str] = []
    rows: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if entry := ENTRY.match(line):
            rows.append([entry[1], entry[2]])
        elif rows and line.startswith(" " * 8):
            rows[-1][1] += f" {line.strip()}"
        else:
            out += table(rows)
            rows = []
            out.append(line)
    return "\n".join(out).rstrip()


def table(rows: list[list[str]]) -> list[str]:
    """The lines of a table without a heading, or as they were where it is a single line."""
    if not rows:
        return []
    cells = [f"| `{name}` | {meaning.replace('|', chr(92) + '|')} |" for name, meaning in rows]
    return ["", "| | |", "|---|---|", *cells, ""]
