"""The README and the pages of docs/ as tests see them: fenced blocks, and the commands in blocks and in text."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from typer.main import get_command

from transformer_vq.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
OUTPUT = {"text", "json"}
"""Languages of what a command printed; these blocks hold no command."""


class Block(NamedTuple):
    """One fenced block."""

    page: str
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The name in its first line, `# name.py`: the reader is to keep it as that file."""
        named = re.match(r"# ([\w-]+\.(?:py|yaml))\b", self.text)
        return named[1] if named else None


def blocks(*languages: str) -> list[Block]:
    """All blocks of these languages, in order; of any language where none is named."""
    found = []
    for page in PAGES:
        for indent, language, text in FENCE.findall(page.read_text(encoding="utf-8")):
            text = "".join(line.removeprefix(indent) for line in text.splitlines(keepends=True))
            found.append(Block(page.relative_to(ROOT).as_posix(), language, text))
    return [block for block in found if not languages or block.language in languages]


def command_lines() -> list[tuple[str, list[str]]]:
    """(page, words) of every command line, in blocks and, where it is of ours, in backticks."""
    found = []
    for block in blocks("bash"):
        lines = block.text.replace("\\\n", " ").splitlines()
        found += [(block.page, line) for line in lines if line.strip() and not line.startswith("#")]
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        name = page.relative_to(ROOT).as_posix()
        found += [(name, " ".join(line.split())) for line in re.findall(r"`(transformer-vq\s[^`]+)`", text)]
    return [(page, words) for page, line in found if (words := shlex.split(line, comments=True))]


def arguments(words: list[str]) -> list[str] | None:
    """What follows `transformer-vq`, also where a launcher starts the module; None for another command."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[0] == "transformer-vq":
        return words[1:]
    return words[words.index("transformer_vq") + 1 :] if "transformer_vq" in words[:-1] else None


def parse(words: list[str]) -> None:
    """By the parser itself: complains of unknown commands and options, and of missing arguments."""
    command, context = get_command(app), None
    while hasattr(command, "commands"):
        context = command.make_context(command.name, words, parent=context)
        _, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
    command.make_context(command.name, words, parent=context)
