"""Who may import whom: down the list in CONTRIBUTING.md, and never in a circle (the contracts: pyproject.toml)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def lint(folder: Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", LINT], cwd=folder, capture_output=True, encoding="utf-8", check=False)
    return done.returncode, done.stdout + done.stderr


def test_imports_point_down_and_never_in_a_circle():
    status, said = lint(ROOT)
    assert status == 0, said


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("ops/nearest.py", "from transformer_vq.models import norm", "transformer_vq.ops is not allowed to import"),
        ("studies/folder.py", "from transformer_vq.bench import oracle", "studies is not allowed to import"),
        ("ops/attention/state.py", "from transformer_vq.ops.attention import call", ".state -> .call"),
    ],
)
def test_a_planted_import_is_found_though_it_is_for_types_alone(tmp_path, file, line, complaint):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "transformer_vq", tmp_path / "transformer_vq", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "transformer_vq" / file).open("a", encoding="utf-8") as module:
        module.write(f"\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {line}\n")
    status, said = lint(tmp_path)
    assert status != 0 and complaint in said, said


def test_the_list_for_readers_is_the_list_that_is_checked():
    rows = re.findall(r"^\| (`[^|]+) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    written = [
        sorted(name.strip("/`, ").removeprefix("transformer_vq/").removesuffix(".py") for name in row.split(", "))
        for row in rows
    ]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    assert written == [sorted(layer.split(" | ")) for layer in settings["contracts"][0]["layers"]]
