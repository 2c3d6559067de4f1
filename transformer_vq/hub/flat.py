"""The modules that a model is made of, as files of one folder that need nothing but torch, einops and transformers.

Generated from the modules themselves, never a second model: the imports of the package are followed from one module,
and every `from transformer_vq.a.b import c` becomes `from .a_b import c`; settings come from plain.py, not pydantic.
"""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "transformer_vq"
PLAIN = f"{PACKAGE}.hub.plain"
ROOT = f"{PACKAGE}.hub.models"
CHECKED = (f"{PACKAGE}.config", "pydantic")
"""What plain.py stands in for."""
OPERATOR = re.compile(rf'"{PACKAGE}::(\w+)"')
UNIQUE = "f\"{__name__.replace('.', '_')}::\\1\""
"""An operator's name: torch keeps one table of them, in which two copies of one folder need names of their own."""


def flat_files() -> dict[str, str]:
    """File name -> source, of everything that `hub/models.py` imports from this package."""
    sources: dict[str, str] = {}
    waiting = [ROOT]
    while waiting:
        module = waiting.pop()
        if module not in sources:
            sources[module], needed = flattened(module)
            waiting += needed
    files = {f"{flat_name(module)}.py": source for module, source in sorted(sources.items())}
    everything = [f"    from .{flat_name(module)} import __doc__ as _" for module in sorted(sources) if module != ROOT]
    listing = "\n\nif TYPE_CHECKING:  # all files of this folder, for programs that copy those that are imported\n"
    root = f"{flat_name(ROOT)}.py"
    files[root] = with_type_checking(files[root]).rstrip() + listing + "\n".join(everything) + "\n"
    return files


def flattened(module: str) -> tuple[str, set[str]]:
    """A module's source with its imports rewritten, and the modules of this package that it needs."""
    source = source_of(module)
    lines, needed = source.splitlines(), set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        new: list[str] = []
        if node.module.startswith(CHECKED):
            needed.add(PLAIN)
            new.append(f"from .{flat_name(PLAIN)} import {names(node.names)}")
        elif node.module.split(".")[0] == PACKAGE:
            inner = [alias for alias in node.names if is_module(f"{node.module}.{alias.name}")]
            plain = [alias for alias in node.names if alias not in inner]
            for alias in inner:
                needed.add(f"{node.module}.{alias.name}")
                new.append(f"from . import {flat_name(f'{node.module}.{alias.name}')} as {alias.asname or alias.name}")
            if plain:
                needed.add(node.module)
                new.append(f"from .{flat_name(node.module)} import {names(plain)}")
        if new:
            assert node.end_lineno is not None
            indent = " " * node.col_offset
            first, last = node.lineno - 1, node.end_lineno
            lines[first:last] = ["\n".join(indent + line for line in new), *[None] * (last - first - 1)]  # type: ignore[list-item]
    text = "\n".join(line for line in lines if line is not None) + "\n"
    return OPERATOR.sub(UNIQUE, text), needed


def with_type_checking(source: str) -> str:
    """The source with `TYPE_CHECKING` imported."""
    return re.sub(
        r"^from typing import (?!.*TYPE_CHECKING)", "from typing import TYPE_CHECKING, ", source, count=1, flags=re.M
    )


def names(aliases: list[ast.alias]) -> str:
    """`a, b as c`."""
    return ", ".join(alias.name + (f" as {alias.asname}" if alias.asname else "") for alias in aliases)


def flat_name(module: str) -> str:
    """transformer_vq.ops.attention.state -> ops_attention_state."""
    return module.removeprefix(f"{PACKAGE}.").replace(".", "_")


def is_module(name: str) -> bool:
    """There is a module of that name."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module and no package
        return False


def source_of(module: str) -> str:
    """The text of a module of this package."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")
