from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from image_cases import run_config, write_pictures

from transformer_vq.config import ConfigError, save_config
from transformer_vq.images import run
from transformer_vq.images.task import ImageTask
from transformer_vq.training.checkpoints import load_tensors
from transformer_vq.training.task import EvaluationStopped


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(ImageTask, "finish", lambda self, folder: None)  # most of a tiny run's time


GAN = {"gan": {"start": 2, "width": 4, "layers": 1}}


def weights(folder, step, player="model"):
    return load_tensors(folder / "checkpoints" / f"step-{step:08d}" / f"{player}.safetensors")


def test_a_run_leaves_numbers_pictures_and_what_it_was_trained_on(tmp_path):
    config = run_config(
        tmp_path / "r", {"quantizer": {"codes": 16, "estimator": "rotation"}, "residual": 2},
        eval={"every": 2, "frechet": "classifier", "classifier_steps": 3, "max_images": 20},
    )  # fmt: skip
    summary = run(config, quiet=True)
    folder = tmp_path / "r"
    assert {p.name for p in (folder / "plots").iterdir()} >= {"reconstructions.png", "code_usage.png", "quality.png"}
    about = json.loads((folder / "data.json").read_text())
    assert about["name"] == "scikit-learn digits" and about["shape"] == [1, 8, 8] and len(about["sha256"]) == 64
    for name in ("mse", "psnr", "ssim", "usage", "usage_batch", "perplexity", "layer1/usage"):
        assert np.isfinite(summary["test"][name]), name
    assert "frechet_classifier" in summary["test"] and "frechet_classifier" not in summary["valid"]
    assert summary["images"] == 4 * 8 and summary["images_per_s"] > 0
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = records[0]
    assert first["split"] == "train" and first["loss"] == pytest.approx(
        first["loss_reconstruction"] + first["loss_quantizers"]
    )


@pytest.mark.parametrize("images", [{}, GAN, {"quantizer": {"codes": 16, "codebook": "gradient", "estimator": "nsvq"}}])
def test_resuming_repeats_the_run_bit_for_bit(tmp_path, images, no_plots):
    data = {"flip": True, "shift": 1}
    whole = run_config(tmp_path / "a", images, data=data, checkpoint={"every": 2, "keep": 5})
    run(whole, quiet=True)
    cut = run_config(tmp_path / "b", images, data=data, checkpoint={"every": 2, "keep": 5})
    task = ImageTask.batch

    def stop(self, step, rows, slot):
        if step == 3:
            raise KeyboardInterrupt
        return task(self, step, rows, slot)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageTask, "batch", stop)
        with pytest.raises(KeyboardInterrupt):
            run(cut, quiet=True)
    run(cut, resume=True, quiet=True)
    for player in ("model", "discriminator") if "gan" in images else ("model",):
        a, b = weights(tmp_path / "a", 4, player), weights(tmp_path / "b", 4, player)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_micro_batches_give_the_step_of_the_whole_batch(tmp_path, no_plots):
    found = []
    for name, micro in (("a", None), ("b", 4)):
        train = {"precision": "fp64", "micro_batch": micro}
        run(run_config(tmp_path / name, {**GAN, "gan": {**GAN["gan"], "adaptive": False}}, train=train), quiet=True)
        found.append([weights(tmp_path / name, 4, player) for player in ("model", "discriminator")])
    for a, b in zip(*found, strict=True):
        for name in a:
            assert torch.allclose(a[name].double(), b[name].double(), rtol=1e-7, atol=1e-9), name


def test_the_discriminator_starts_late_and_then_is_listened_to(tmp_path, no_plots):
    run(run_config(tmp_path / "r", GAN, checkpoint={"every": 1, "keep": 9}), quiet=True)
    before, at_start, after = (weights(tmp_path / "r", step, "discriminator") for step in (1, 2, 3))
    assert all(torch.equal(before[name], at_start[name]) for name in before)
    assert any(not torch.equal(at_start[name], after[name]) for name in before)
    lines = (json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines())
    records = [record for record in lines if record["split"] == "train"]
    assert [record["gan_weight"] > 0 for record in records] == [False, False, True, True]
    assert "discriminator/loss" not in records[0] and records[2]["discriminator/loss"] > 0


def test_init_from_takes_another_quantizers_autoencoder(tmp_path, no_plots):
    run(run_config(tmp_path / "plain", {"quantizer": {"kind": "none"}}), quiet=True)
    config = run_config(tmp_path / "vq", train={"init_from": str(tmp_path / "plain"), "lr": 1e-12, "steps": 1})
    run(config, quiet=True)
    a, b = weights(tmp_path / "plain", 4), weights(tmp_path / "vq", 1)
    assert torch.allclose(a["encoder.1.0.weight"], b["encoder.1.0.weight"], atol=1e-9)


@pytest.mark.parametrize(
    ("ours", "taken"), [({"codes": 16}, True), ({"codes": 12}, False), ({"codes": 16, "start_step": 5}, False)]
)
def test_init_from_takes_a_quantizer_whole_or_not(tmp_path, no_plots, ours, taken):
    run(run_config(tmp_path / "a"), quiet=True)
    origin = {"init_from": str(tmp_path / "a"), "lr": 1e-12, "steps": 1}
    run(run_config(tmp_path / "b", {"quantizer": {**ours, "ema": 1 - 1e-9}}, train=origin), quiet=True)
    a, b = weights(tmp_path / "a", 4), weights(tmp_path / "b", 1)
    name = next(key for key in a if key.endswith("ema_sum"))
    same = a[name].shape == b[name].shape and torch.allclose(a[name], b[name], atol=1e-6)
    assert same == taken and torch.allclose(a["encoder.1.0.weight"], b["encoder.1.0.weight"], atol=1e-9)


@pytest.mark.parametrize(
    ("images", "blocks", "message"),
    [
        ({"quantizer": {"codes": 16, "estimator": "rotaton"}}, {}, r"estimator = rotaton: .*did you mean 'rotation'"),
        ({"quantizer": {"codes": 200, "init": "kmeans"}}, {}, r"codes = 200: .* 8 pictures have 128 grid cells"),
        ({"quantizer": {"codes": 200, "start_step": 2}}, {}, r"codes = 200: .* 8 pictures have 128 grid cells"),
        ({"multipliers": [1, 1, 1, 1, 1]}, {}, r"a cell is 16 pixels wide, 8x8 pictures make no whole grid"),
        ({}, {"data": {"source": "/nowhere"}}, r"data\.source = /nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, images, blocks, message):
    with pytest.raises(ConfigError, match=message) as error:
        run(run_config(tmp_path / "r", images, **blocks), quiet=True)
    assert "\n" not in str(error.value) and not (tmp_path / "r").exists()


def test_a_folder_that_is_no_good_leaves_nothing(tmp_path):
    folder = write_pictures(tmp_path / "p")
    (folder / "a05.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"a05\.png"):
        run(run_config(tmp_path / "r", data={"source": str(folder)}), quiet=True)
    assert not (tmp_path / "r").exists()


@pytest.mark.distributed
def test_two_processes_equal_one(tmp_path):
    images = {"gan": {**GAN["gan"], "adaptive": False}}
    blocks = {"train": {"precision": "fp64"}, "eval": {"every": 2, "frechet": "classifier", "classifier_steps": 2}}
    run(run_config(tmp_path / "one", images, **blocks), quiet=True)
    save_config(run_config(tmp_path / "two", images, **blocks), tmp_path / "two.yaml")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "transformer_vq", "images", str(tmp_path / "two.yaml"), "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        try:
            output, _ = launcher.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            launcher.terminate()  # it takes its two processes with it; a kill would leave them
            raise
    assert launcher.returncode == 0, output
    for player in ("model", "discriminator"):
        a, b = (weights(tmp_path / name, 4, player) for name in ("one", "two"))
        for name in a:
            assert torch.allclose(a[name].double(), b[name].double(), rtol=1e-6, atol=1e-9), name


def test_an_evaluation_stops_between_batches(tmp_path):
    task, seen = ImageTask(run_config(tmp_path / "r", eval={"batch_size": 5}), torch.device("cpu")), []
    task.stop_asked = lambda: len(seen) >= 2 or bool(seen.append(0))
    with pytest.raises(EvaluationStopped):
        task.evaluate("valid", final=True)
    assert len(seen) == 2


def test_an_image_run_is_trained_on(tmp_path, no_plots):
    """Two players, data of its own beside the run: 2 steps and then 4 are 4."""
    settings = {"schedule": "constant", "warmup": 0}
    run(run_config(tmp_path / "straight", GAN, train=settings), quiet=True)
    run(run_config(tmp_path / "run", GAN, train={**settings, "steps": 2}), quiet=True)
    run(run_config(tmp_path / "run", GAN, train=settings), quiet=True, resume=True)
    for player in ("model", "discriminator"):
        for name, w in weights(tmp_path / "straight", 4, player).items():
            assert torch.equal(weights(tmp_path / "run", 4, player)[name], w), name
