from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from image_cases import images_config
from scipy.linalg import sqrtm

from transformer_vq.config import ConfigError
from transformer_vq.config.images import ImageDataConfig, ImageEvalConfig
from transformer_vq.images.batches import to_unit
from transformer_vq.images.classifier import classifier_of
from transformer_vq.images.distances import ClassifierDistance, plan
from transformer_vq.images.metrics import evaluate_split, reconstruct
from transformer_vq.images.model import ImageModel
from transformer_vq.images.pictures import InMemory, Shape
from transformer_vq.images.sources import open_corpus

RAW = np.random.default_rng(0).integers(256, size=(10, 1, 8, 8), dtype=np.uint8)


def test_numbers_are_what_their_names_say_whatever_the_batch_size():
    model = ImageModel(images_config({"codes": 16}, residual=2, product=2), channels=1)
    numbers, codes = evaluate_split(model, InMemory(RAW), batch_size=4)
    model.eval()
    with torch.no_grad():
        out = model(to_unit(torch.from_numpy(RAW)))
    difference = (out.pictures.clamp(-1, 1) / 2 + 0.5 - torch.from_numpy(RAW) / 255).double()
    assert numbers["mse"] == pytest.approx(difference.square().mean().item(), rel=1e-5)
    assert numbers["l1"] == pytest.approx(difference.abs().mean().item(), rel=1e-5)
    each = -10 * difference.square().mean(dim=(1, 2, 3)).log10()
    assert numbers["psnr"] == pytest.approx(each.mean().item(), rel=1e-5)
    error = (out.latents.keys - out.latents.quantized).square().sum(1).mean().item()
    assert numbers["quantization_error"] == pytest.approx(error, rel=1e-5)
    taken = out.latents.codes[:, 0]  # stage 0: (B, H, h, w)
    used = [taken[:, part].unique().numel() for part in range(2)]
    assert numbers["layer0/usage"] == pytest.approx(sum(used) / 32)
    assert numbers["layer0/dead_codes"] == pytest.approx(16 - sum(used) / 2)
    batches = [taken[i : i + 4, part].unique().numel() / 16 for i in (0, 4) for part in range(2)]
    later = out.latents.codes[:, 1]
    batches += [later[i : i + 4, part].unique().numel() / 16 for i in (0, 4) for part in range(2)]
    assert numbers["usage_batch"] == pytest.approx(np.mean(batches))  # the last, smaller batch is left out
    share = torch.bincount(taken[:, 0].flatten(), minlength=16) / taken[:, 0].numel()
    assert codes.histograms()[0][0].tolist() == (share * 160).round().tolist()
    again, _ = evaluate_split(model, InMemory(RAW), batch_size=10)
    assert {k: v for k, v in again.items() if k != "usage_batch"} == pytest.approx(
        {k: v for k, v in numbers.items() if k != "usage_batch"}, rel=1e-4
    )
    assert evaluate_split(model, InMemory(RAW), 4, limit=3)[0]["images"] == 3


def test_reconstruct_gives_bytes_and_leaves_the_mode_alone():
    model = ImageModel(images_config({"codes": 16}), channels=1).train()
    made = reconstruct(model, torch.from_numpy(RAW))
    assert made.dtype == torch.uint8 and made.shape == RAW.shape and model.training


def test_without_codes_there_are_no_numbers_about_codes():
    numbers, codes = evaluate_split(ImageModel(images_config({"kind": "none"}), 1), InMemory(RAW), 4)
    assert numbers["quantization_error"] == 0 and "usage" not in numbers and codes.histograms() == []


def corpus(labels: bool = True):
    found = open_corpus(ImageDataConfig(source="digits", max_images=400))
    if labels:
        return found
    splits = {name: InMemory(split.read(np.arange(len(split)))) for name, split in found.splits.items()}
    return type(found)(found.name, splits, found.shape, None, found.sha256)


def test_frechet_distance_on_the_classifiers_features(tmp_path):
    found = corpus()
    distance = ClassifierDistance(found, steps=60, cache=str(tmp_path), device=torch.device("cpu"))
    real = torch.from_numpy(found.splits["train"].read(np.arange(200)))
    noise = torch.randint(256, real.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    distance.update(real, noise)
    numbers = distance.compute()
    a, b = (distance.trained.model(x).detach().numpy() for x in (real, noise))
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    want = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert numbers["frechet_classifier"] == pytest.approx(want, rel=1e-3)
    assert numbers["classifier_accuracy"] > 0.8 and numbers["classifier_task"] == "labels"


def test_classifier_depends_on_the_corpus_alone_and_is_kept(tmp_path):
    one = classifier_of(corpus(), 5, str(tmp_path / "a"), torch.device("cpu"))
    torch.manual_seed(7)
    two = classifier_of(corpus(), 5, str(tmp_path / "b"), torch.device("cpu"))
    kept = classifier_of(corpus(), 5, str(tmp_path / "a"), torch.device("cpu"))
    for other in (two, kept):
        assert other.accuracy == one.accuracy
        for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(p, q)
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_unlabelled_pictures_are_told_apart_by_their_turns(tmp_path):
    trained = classifier_of(corpus(labels=False), 80, str(tmp_path), torch.device("cpu"))
    assert trained.task == "turns" and trained.accuracy > 0.6  # chance is a quarter


def test_fid_is_never_another_network_under_its_name(tmp_path):
    found, cpu = corpus(), torch.device("cpu")
    nothing = plan(ImageEvalConfig(frechet="none"), found, None)
    assert not nothing.makers and not nothing.notes
    pytest.importorskip("torchmetrics")
    if __import__("importlib.util").util.find_spec("torch_fidelity"):
        pytest.skip("the standard weights may be at hand")
    planned = plan(ImageEvalConfig(frechet="auto", classifier_steps=3), found, str(tmp_path))
    chosen, notes = planned.make(cpu), planned.notes
    chosen[0].update(*[torch.from_numpy(found.splits["test"].read(np.arange(20)))] * 2)
    numbers = chosen[0].compute()
    assert "fid" not in numbers and math.isfinite(numbers["frechet_classifier"])
    assert "cannot be had here" in notes[0]
    with pytest.raises(ConfigError, match=r"eval\.frechet = inception: FID"):
        plan(ImageEvalConfig(frechet="inception"), found, None)
    with pytest.raises(ConfigError, match=r"eval\.lpips = true: LPIPS"):
        plan(ImageEvalConfig(frechet="none", lpips=True), dataclasses.replace(found, shape=Shape(1, 16, 16)), None)
