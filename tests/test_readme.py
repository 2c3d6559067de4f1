"""What the README shows is true: its Python runs, its YAML is valid, its commands exist and their settings too."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import tiny_run

from transformer_vq import TransformerVQ, TransformerVQConfig
from transformer_vq.cli import COMMANDS
from transformer_vq.config import RunConfig, load_config, validate
from transformer_vq.ops import estimators
from transformer_vq.training import run

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    """Every `transformer-vq …` line, in blocks and in tables."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    lines += re.findall(r"`(transformer-vq [^`]+)`", README)
    return [shlex.split(line, comments=True) for line in lines if line.startswith("transformer-vq ")]


def test_the_model_in_ten_lines_runs():
    names = {}
    exec(blocks("python")[0], names)
    assert torch.isfinite(names["out"].loss) and names["more"].logits.shape == (2, 1, 256)


def test_the_estimator_of_ones_own_is_found_and_does_what_it_says(tmp_path, monkeypatch):
    source = next(block for block in blocks("python") if "my_estimators.py" in block)
    (tmp_path / "my_estimators.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_estimators", raising=False)
    k, q = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    got = estimators.apply("my_estimators:half", k, q)
    (gradient,) = torch.autograd.grad(got, k, torch.ones_like(k))
    assert torch.equal(got, q) and torch.equal(gradient, torch.full_like(k, 0.5))


def test_the_quantizer_of_ones_own_trains(tmp_path, monkeypatch):
    source = next(block for block in blocks("python") if "my_quantizers.py" in block)
    (tmp_path / "my_quantizers.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_quantizers", raising=False)
    chosen = {"kind": "my_quantizers:Frozen", "codes": 8, "options": {"scale": 0.35}}
    sizes = {"layers": 2, "width": 16, "key_dim": 8, "value_dim": 16, "window": 4, "block_len": 4}
    model = TransformerVQ(TransformerVQConfig(vocab_size=16, quantizer=chosen, **sizes))
    tokens = torch.randint(16, (2, 21))
    model(tokens[:, :-1], labels=tokens[:, 1:]).loss.backward()
    model.apply_codebook_statistics()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_run_becomes_a_model_of_transformers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tiny_run(tmp_path, "runs/tiny"), quiet=True)
    names = {}
    exec(next(block for block in blocks("python") if "from_run" in block), names)
    assert names["model"](torch.tensor([[1, 2]])).logits.shape == (1, 2, names["model"].config.vocab_size)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_config_is_valid(block):
    validate(yaml.safe_load(block), RunConfig)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_exists_and_its_settings_too(words):
    _, command, *rest = words
    assert command in {*COMMANDS, "study", "bench"}
    if command in ("train", "describe", "doctor") and "CONFIG" not in rest:
        overrides = [word for word in rest[1:] if "=" in word and not word.startswith("-")]
        load_config(rest[0], overrides, RunConfig)


def test_every_file_that_is_linked_exists():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
