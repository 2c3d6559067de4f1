"""What is built to be installed: every module, recipe and template is in, nothing else is, and it runs on its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from documents import ROOT

TINY = ["train.steps=4", "train.batch_size=2", "train.seq_len=64", "eval.max_tokens=500", "data.max_eval_bytes=2000"]
BESIDE = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "pyproject.toml", ".gitignore", "PKG-INFO"}
"""In the sdist, apart from the package and the recipes; the last three are the builder's."""


def build(source: Path, target: Path, kind: str) -> Path:
    """By the backend that pyproject.toml names, without an environment of its own: the network is not needed."""
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(target)],
        cwd=source, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (found,) = target.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return found


def installed_names() -> set[str]:
    """What the package folder of an installation holds, by this checkout."""
    package = {path.relative_to(ROOT) for path in (ROOT / "transformer_vq").rglob("*") if path.is_file()}
    recipes = {Path("transformer_vq") / path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")}
    return {path.as_posix() for path in package | recipes if "__pycache__" not in path.parts}


def names_of(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_wheel_and_sdist_hold_everything_and_nothing_else(tmp_path):
    names = names_of(build(ROOT, tmp_path / "wheel", "wheel"))
    assert names == installed_names()
    assert {"transformer_vq/py.typed", "transformer_vq/configs/lm/tiny.yaml"} <= names
    assert any("/templates/" in name for name in names) and not any(re.search(r"tests?/|\.pyc", name) for name in names)

    with tarfile.open(build(ROOT, tmp_path / "sdist", "sdist")) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
        file.extractall(tmp_path / "unpacked", filter="data")
    assert {name for name in held if not name.startswith(("transformer_vq/", "configs/"))} == BESIDE
    (source,) = (tmp_path / "unpacked").iterdir()
    assert names_of(build(source, tmp_path / "again", "wheel")) == names


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_they_install_into_an_empty_environment_and_train_there(tmp_path):
    """With the package registry, for an environment that holds nothing but what they ask for."""
    environment, place = tmp_path / "environment", tmp_path / "place"
    venv.create(environment, with_pip=True)
    place.mkdir()
    (place / "text.txt").write_text("".join(f"{i} green bottles, {i * i % 97} left\n" for i in range(3000)))
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def call(program: str, *arguments: str) -> str:
        done = subprocess.run(
            [str(environment / "bin" / program), *arguments],
            cwd=place, env=variables, capture_output=True, encoding="utf-8", check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    constraints = str(ROOT / "constraints.txt")
    pip = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--constraint", constraints)
    call("python", *pip, "torch")  # alone, so that the constraints decide its build
    call("python", *pip, str(build(ROOT, tmp_path / "wheel", "wheel")))
    for kind in ("wheel", "sdist"):
        if kind == "sdist":
            call("python", *pip, "--no-deps", "--force-reinstall", str(build(ROOT, tmp_path / "sdist", "sdist")))
        assert str(environment) in call("python", "-c", "import transformer_vq; print(transformer_vq.__file__)")
        settings = ["data.source=text.txt", f"run_dir=runs/{kind}", *TINY]
        call("transformer-vq", "train", "lm/tiny", *settings, "--quiet")
        assert call("transformer-vq", "generate", f"runs/{kind}", "--prompt", "1 green", "--tokens", "8")
        assert "bits_per_byte" in call("transformer-vq", "eval", f"runs/{kind}", "--json")
        assert (place / "runs" / kind / "plots").is_dir()
