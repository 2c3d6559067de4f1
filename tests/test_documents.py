"""What the README and the pages say is true: Python runs, YAML is valid, commands are understood and settings exist."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest
import torch
import yaml
from documents import OUTPUT, ROOT, arguments, blocks, command_lines, parse
from PIL import Image
from tiny_run import tiny_run

from transformer_vq import TransformerVQ, TransformerVQConfig
from transformer_vq.cli import run as cli
from transformer_vq.config import load_config
from transformer_vq.ops import estimators
from transformer_vq.studies.kinds import kind_of
from transformer_vq.studies.plan import load_study
from transformer_vq.training import run

PLACEHOLDERS = {"CONFIG": "lm/study", "CONFIG.yaml": "lm/study", "STUDY.yaml": "studies/estimators-tiny"}
DRY_RUNS = {"train", "images", "study run", "describe"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with what pages speak of: `runs/tiny`, trained, and folders of pictures."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("folder", "FOLDER"):
        (folder / name).mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(folder / name / f"{i}.png")
    run(tiny_run(folder, "runs/tiny"), quiet=True)
    return folder


@pytest.fixture
def reader(trained, monkeypatch):
    """Where somebody who reads along works: the folder above, and an import path that forgets their modules."""
    monkeypatch.chdir(trained)
    monkeypatch.syspath_prepend(trained)
    for block in blocks("python", "yaml"):
        if block.file:
            (trained / block.file).write_text(block.text, encoding="utf-8")
            monkeypatch.delitem(sys.modules, block.file.removesuffix(".py"), raising=False)
    return trained


def in_page(page, part):
    return next(block for block in blocks("python") if block.page == page and part in block.text)


@pytest.mark.parametrize("block", blocks(), ids=lambda block: block.page)
def test_a_block_says_what_it_is(block):
    assert block.language in {"python", "yaml", "bash", *OUTPUT}, block.text
    if block.language in OUTPUT:  # commands are checked where they are called bash
        assert not re.search(
            r"^\$? ?(transformer-vq|pip|scripts/\w+|python|torchrun|accelerate) ", block.text, re.MULTILINE
        )


@pytest.mark.parametrize("page", sorted({block.page for block in blocks("python")}))
def test_the_python_of_a_page_runs_from_top_to_bottom(page, reader):
    names = {"__name__": "__main__"}
    for block in blocks("python"):
        if block.page == page:
            exec(compile(block.text, f"{page}: {block.text[:40]!r}", "exec"), names)


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.page)
def test_every_config_is_valid(block, reader):
    tree, file = yaml.safe_load(block.text), reader / (block.file or "block.yaml")
    file.write_text(block.text, encoding="utf-8")
    if "factors" in tree or "base" in tree:
        load_study(str(file), [])
    else:
        special = tree.keys() & {"recall", "images", "toy"}
        load_config(file, [], kind_of(tree if special else {"model": {}}, block.page).settings_class())


def spelled(value):
    return value if isinstance(value, str) else " ".join(value)


@pytest.mark.parametrize(("page", "words"), command_lines(), ids=spelled)
def test_every_command_is_understood(page, words, reader, capsys):
    given = arguments(words)
    if given is None:
        check_other_command(words)
        return
    given = [PLACEHOLDERS.get(word, word) for word in given]
    parse(given)
    for dry in DRY_RUNS:
        if given[: len(dry.split())] == dry.split():
            flags = [] if dry == "describe" or "--dry-run" in given else ["--dry-run"]
            smaller = ["model.layers=2"] if "lm/enwik8" in given else []  # its estimate of memory goes layer by layer
            assert cli([*given, *smaller, *flags]) == 0, capsys.readouterr().err


def check_other_command(words):
    """A script of ours exists, and so does an extra that is to be installed."""
    if words[0].startswith("scripts/"):
        assert (ROOT / words[0]).is_file(), words[0]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for named in re.findall(r"transformer-vq\[([\w,-]+)\]", " ".join(words)):
        assert set(named.split(",")) <= extras.keys(), named


@pytest.mark.parametrize("block", blocks("bash"), ids=lambda block: block.page)
def test_every_block_of_commands_is_one_that_a_shell_reads(block):
    said = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, encoding="utf-8", check=False)
    assert said.returncode == 0, said.stderr


def test_the_estimator_of_ones_own_does_what_it_says(reader):
    k, q = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    got = estimators.apply("my_estimators:half", k, q)
    (gradient,) = torch.autograd.grad(got, k, torch.ones_like(k))
    assert torch.equal(got, q) and torch.equal(gradient, torch.full_like(k, 0.5))


def test_the_quantizer_of_ones_own_trains(reader):
    chosen = {"kind": "my_quantizers:Frozen", "codes": 8, "options": {"scale": 0.35}}
    sizes = {"layers": 2, "width": 16, "key_dim": 8, "value_dim": 16, "window": 4, "block_len": 4}
    model = TransformerVQ(TransformerVQConfig(vocab_size=16, quantizer=chosen, **sizes))
    tokens = torch.randint(16, (2, 21))
    model(tokens[:, :-1], labels=tokens[:, 1:]).loss.backward()
    model.apply_codebook_statistics()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
