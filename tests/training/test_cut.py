"""However a batch is cut into micro-batches, noise, dropout and codebooks are those of the whole."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import assert_same
from image_cases import run_config
from tiny_run import tiny_run

from transformer_vq.images import run as run_images
from transformer_vq.images.task import ImageTask
from transformer_vq.training import LanguageTask, run


@pytest.fixture(autouse=True)
def no_pictures_and_little_evaluation(monkeypatch):
    for task in (ImageTask, LanguageTask):
        monkeypatch.setattr(task, "finish", lambda self, folder: None)
        monkeypatch.setattr(task, "evaluate", lambda self, split, final: {"mse": 1.0, "bits_per_byte": 1.0})


def losses(folder, names) -> dict[str, torch.Tensor]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [r for r in records if r["split"] == "train"]
    return {name: torch.tensor([r[name] for r in train], dtype=torch.float64) for name in names}


QUANTIZERS = {
    "gumbel": {"codes": 8, "codebook": "gradient", "estimator": "gumbel"},
    "random_rotation": {"codes": 8, "estimator": "random_rotation"},
    "kmeans": {"codes": 8, "init": "kmeans"},
    "data": {"codes": 8, "init": "data", "codebook": "gradient"},
    "late": {"codes": 8, "start_step": 2},
    "replaced": {"codes": 8, "dead_code_threshold": 14.0, "ema": 0.5},
}
DROPOUT = {f"model__dropout_{where}": 0.3 for where in ("embedding", "sinusoid", "residual", "layer")}


@pytest.mark.parametrize("name", [*QUANTIZERS, "dropout", "streams"])
def test_a_language_model(tmp_path, name):
    settings = {"model__quantizer": QUANTIZERS[name]} if name in QUANTIZERS else DROPOUT
    if name == "streams":
        settings = settings | {"data__order": "streams", "train__updates_per_sequence": 3}
    steps = 13 if name == "replaced" else 4
    found = []
    for micro in (4, 2, 1):
        config = tiny_run(
            tmp_path, f"m{micro}", train__micro_batch=micro, train__steps=steps, train__precision="fp64", **settings
        )
        run(config, quiet=True)
        found.append(losses(tmp_path / f"m{micro}", ("loss", "loss_commit", "grad_norm")))
    assert_same(found[1], found[0], rtol=1e-8)
    assert_same(found[2], found[0], rtol=1e-8)


IMAGES = {
    "nsvq": {"quantizer": {"codes": 16, "codebook": "gradient", "estimator": "nsvq"}, "dropout": 0.3},
    "sf_diveq": {"quantizer": {"codes": 16, "codebook": "gradient", "estimator": "sf_diveq"}},
    "diveq_noise": {"quantizer": {"codes": 16, "codebook": "gradient", "estimator": "diveq_noise"}, "product": 2},
    "gumbel": {"quantizer": {"codes": 16, "codebook": "gradient", "estimator": "gumbel"}},
    "random_rotation": {"quantizer": {"codes": 16, "estimator": "random_rotation"}, "residual": 2},
    "kmeans": {"quantizer": {"codes": 16, "init": "kmeans"}, "residual": 2},
    "late": {"quantizer": {"codes": 16, "init": "data", "start_step": 1}},
}


@pytest.mark.parametrize("name", IMAGES)
def test_a_model_of_pictures(tmp_path, name):
    found = []
    for micro in (8, 2):
        train = {"precision": "fp64", "micro_batch": micro, "steps": 3}
        run_images(run_config(tmp_path / f"m{micro}", IMAGES[name], train=train), quiet=True)
        found.append(losses(tmp_path / f"m{micro}", ("loss", "grad_norm")))
    assert_same(found[1], found[0], rtol=1e-8)
