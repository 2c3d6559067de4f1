"""An image run is said to take what it takes: peaks of real steps against one on fake tensors."""

from __future__ import annotations

import json

import pytest
import torch
from image_cases import run_config
from peaks import peaks_of_steps

from transformer_vq.cli import run as command
from transformer_vq.config import save_config
from transformer_vq.images import memory, run
from transformer_vq.images.pictures import Shape
from transformer_vq.images.task import ImageTask
from transformer_vq.training import memory as of_training

SHAPE = Shape(1, 16, 16)
CASES = {
    "plain": ({}, {}),
    "gumbel": ({"quantizer": {"codes": 512, "estimator": "gumbel", "codebook": "gradient"}}, {}),
    "gan in micro-batches": ({"gan": {"start": 0, "width": 16, "layers": 1}}, {"micro_batch": 8}),
    "mostly parameters": ({"width": 128, "code_dim": 32}, {"batch_size": 16}),
    "decoded twice": ({"quantizer": {"codes": 64, "estimator": "hessian", "codebook": "gradient"}}, {}),
    "bf16, residual": ({"residual": 2, "quantizer": {"codes": 64, "estimator": "rotation"}}, {"precision": "bf16"}),
    "attention, dropout": ({"attention": "lowest", "dropout": 0.1}, {"optimizer": "adafactor"}),
}
SOON = ("gan in micro-batches",)


def config_of(folder, name):
    images, train = CASES[name]
    network = {"width": 32, "multipliers": [1, 2], "blocks": 1, "code_dim": 8, **images}
    return run_config(folder, network, train={"steps": 2, "batch_size": 32, **train}, data={"size": 16})


@pytest.fixture(autouse=True)
def one_thread():
    """Convolutions have scratch memory a thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", [pytest.param(c, marks=[] if c in SOON else pytest.mark.slow) for c in CASES])
def test_a_step_takes_what_is_said(name, tmp_path, monkeypatch):
    config = config_of(tmp_path / "r", name)
    said = memory.step_memory(config, SHAPE, "cpu").total
    monkeypatch.setattr(ImageTask, "finish", lambda self, folder: None)
    found = peaks_of_steps(monkeypatch)
    run(config, quiet=True)
    print(f"{name}: {said / 2**20:.2f} MiB said, {found[-1] / 2**20:.2f} measured")
    assert said == pytest.approx(found[-1], rel=0.2)


@pytest.mark.parametrize("name", CASES)
def test_rough_is_more_than_what_it_stands_for(name, tmp_path):
    config = config_of(tmp_path / "r", name)
    needed = memory.step_memory(config, SHAPE, "cpu").total
    assert memory.roughly(config, SHAPE) > needed


def test_a_perceptual_loss_is_looked_through(tmp_path):
    """Its network's weights and activations are there; they have no gradient."""

    class Distance(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = torch.nn.Conv2d(1, 256, 3, padding=1).requires_grad_(False)

        def forward(self, pictures, decoded):
            return (self.seen(pictures) - self.seen(decoded)).square().mean()

    config = config_of(tmp_path / "r", "plain")
    without, with_it = (memory.step_memory(config, SHAPE, "cpu", perceptual=x) for x in (None, Distance()))
    assert with_it.parameters - without.parameters == 4 * (256 * 9 + 256)
    assert with_it.passes - without.passes >= 4 * 32 * 256 * 16 * 16


def test_a_large_network_needs_no_memory(tmp_path):
    config = run_config(tmp_path / "r", {"width": 4096}, train={"batch_size": 4096})
    assert memory.step_memory(config, Shape(3, 64, 64), "cuda").total > 2**40


def test_dry_run_warns_and_goes_on(tmp_path, monkeypatch, capsys):
    config = config_of(tmp_path / "r", "plain")
    path = tmp_path / "c.yaml"
    save_config(config, path)
    assert command(["images", str(path), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["short_of_memory"] is None
    needed = memory.step_memory(config, SHAPE, "cpu").total
    for there, short in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr(of_training, "available", lambda device, there=there: there)
        assert command(["images", str(path), "--dry-run"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert ("a step takes about" in out) == ("it may not fit" in out) == short
        assert "nothing was trained or written" in out
