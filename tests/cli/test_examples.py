"""Every command's help ends with examples, and they are lines that run."""

from __future__ import annotations

import re
import shlex

import pytest
from documents import ROOT, parse
from typer.main import get_command

from transformer_vq.cli import app, run
from transformer_vq.cli.examples import EXAMPLES
from transformer_vq.config.load import load_config
from transformer_vq.studies.kinds import kind_of
from transformer_vq.studies.plan import load_study

LINES = [(command, line) for command, lines in EXAMPLES.items() for line in lines]
RECIPE = re.compile(r"(lm|images|recall|studies)/[\w-]+")


def commands(command=None, path=""):
    """Every command and group of the program, as typed after `transformer-vq`."""
    command = command or get_command(app)
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{path} {name}".strip())


def test_no_command_is_without_an_example_and_no_example_without_a_command():
    assert sorted(commands()) == sorted(EXAMPLES)
    assert all(1 <= len(lines) <= 3 for lines in EXAMPLES.values())


@pytest.mark.parametrize("columns", ["80", "120"])
@pytest.mark.parametrize("command", EXAMPLES)
def test_help_ends_with_them_and_breaks_no_line(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert run([*command.split(), "--help"]) == 0
    said = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    lines = EXAMPLES[command]
    assert said[-len(lines) :] == list(lines) and said[-len(lines) - 1] in ("Example:", "Examples:")


@pytest.mark.parametrize(("command", "line"), LINES, ids=[line.removeprefix("transformer-vq ") for _, line in LINES])
def test_an_example_is_understood(command, line):
    """By the real parser; recipes are shipped, and settings are such that a recipe has."""
    program, *words = shlex.split(line)
    assert program == "transformer-vq" and words[: len(command.split())] == command.split()
    parse(words)
    overrides = [word for word in words if re.match(r"[a-z_]+(\.\w+)*=", word)]
    (recipe,) = [word for word in words if RECIPE.fullmatch(word)] or ["lm/tiny"]
    assert (ROOT / "configs" / f"{recipe}.yaml").is_file()
    if recipe.startswith("studies/"):
        load_study(recipe, overrides)
    else:
        kind = kind_of({recipe.split("/")[0].replace("lm", "model"): {}}, recipe)
        load_config(recipe, overrides, kind.settings_class())
