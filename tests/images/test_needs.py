"""What the end of a run needs is looked at before its beginning: too few or too small pictures leave a number out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from image_cases import run_config, write_pictures

from transformer_vq.config import ConfigError
from transformer_vq.images import run
from transformer_vq.images.networks import PatchDiscriminator, patches
from transformer_vq.images.task import ImageTask

AUTO = {"frechet": "auto", "classifier_steps": 2}


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(ImageTask, "finish", lambda self, folder: None)


def config(tmp_path, count, size=(8, 8), images=None, **blocks):
    folder = write_pictures(tmp_path / "p", count=count, size=size)
    data = {"source": str(folder), "max_images": None}
    return run_config(tmp_path / "r", images, **{"eval": AUTO, **blocks, "data": data})


def test_thirty_pictures_make_a_whole_run(tmp_path, no_plots):
    settings = config(tmp_path, 30)
    said = ImageTask(settings, torch.device("cpu")).describe()["note"]
    assert "no Fréchet distance: it needs 2 pictures of the test split, there is 1" in said
    test = run(settings, quiet=True)["test"]
    assert "no Fréchet distance" in test["notes"] and not {"frechet_classifier", "fid"} & set(test)
    assert np.isfinite([test[name] for name in ("mse", "psnr", "ssim")]).all() and test["images"] == 1
    assert "no Fréchet distance" in "; ".join(json.loads((tmp_path / "r" / "data.json").read_text())["notes"])


@pytest.mark.parametrize(
    ("count", "size", "images", "left_out"),
    [
        (3, (8, 8), {}, {"frechet_classifier"}),  # one picture a split, a batch of eight
        (60, (8, 8), {}, set()),
        (60, (4, 2), {}, {"ssim"}),
        (60, (1, 1), {"multipliers": [1], "width": 64}, {"ssim", "frechet_classifier"}),
        (60, (32, 2), {"gan": None, "perceptual_weight": 1.0}, {"ssim"}),
    ],
)
def test_numbers_are_there_and_finite_or_left_out_and_said(tmp_path, no_plots, count, size, images, left_out):
    settings = config(tmp_path, count, size, images)
    said = ImageTask(settings, torch.device("cpu")).describe()["note"]
    summary = run(settings, quiet=True)
    have = {"ssim", "frechet_classifier"} & set(summary["test"])
    assert {"ssim", "frechet_classifier"} - have == left_out
    for name in left_out:
        assert f"no {name}" in said or "no Fréchet distance" in said
        assert name not in summary["valid"]
        assert f"no {name}" in summary["test"]["notes"] or "no Fréchet distance" in summary["test"]["notes"]
    assert all(np.isfinite(x) for x in summary["test"].values() if isinstance(x, float))


@pytest.mark.parametrize(
    ("size", "images", "blocks", "message"),
    [
        (
            (8, 8),
            {"gan": {"layers": 3, "width": 4}},
            {},
            r"images\.gan\.layers = 3: the discriminator sees nothing",
        ),
        ((2, 2), {}, {}, r"2x2 colour pictures make one grid cell"),
        ((8, 8), {}, {"eval": {"frechet": "inception"}}, r"eval\.frechet = inception: FID"),
        ((16, 16), {}, {"eval": {"lpips": True, "frechet": "none"}}, r"eval\.lpips = true: LPIPS"),
    ],
)
def test_what_cannot_be_is_refused_before_training(tmp_path, size, images, blocks, message):
    if "eval" in blocks and __import__("importlib.util").util.find_spec("torchvision"):
        pytest.skip("the standard weights may be at hand")
    with pytest.raises(ConfigError, match=message):
        run(config(tmp_path, 60, size, images, **blocks), quiet=True)
    assert not (tmp_path / "r").exists()


def test_a_cache_that_cannot_be_is_heard_of_first(tmp_path):
    (tmp_path / "file").write_text("")
    settings = config(tmp_path, 60)
    data = settings.data.model_copy(update={"cache": str(tmp_path / "file" / "cache")})
    with pytest.raises(ConfigError, match=r"data\.cache = .*file is no folder to write to"):
        run(settings.model_copy(update={"data": data}), quiet=True)
    assert not (tmp_path / "r").exists()


def test_a_damaged_classifier_is_trained_again(tmp_path, no_plots):
    settings = config(tmp_path, 60)
    first = run(settings, quiet=True)["test"]["frechet_classifier"]
    (kept,) = (tmp_path / "cache").iterdir()
    raw = bytearray(kept.read_bytes())
    raw[9] ^= 255
    kept.write_bytes(raw)
    assert run(settings, overwrite=True, quiet=True)["test"]["frechet_classifier"] == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_patches_counts_what_the_discriminator_gives(layers):
    for side in range(2, 20):
        if patches(layers, side) < 1:
            with pytest.raises(RuntimeError):
                PatchDiscriminator(1, 4, layers)(torch.zeros(2, 1, side, side))
        else:
            assert PatchDiscriminator(1, 4, layers)(torch.zeros(2, 1, side, side)).shape[-1] == patches(layers, side)
