"""The toy of the estimator experiments: what it promises about its data, its numbers and its symmetries."""

from __future__ import annotations

import pytest
import torch

from transformer_vq.config import validate
from transformer_vq.config.toy import ToyConfig, ToyRunConfig
from transformer_vq.studies.toy import ToyTask, mixture, run

SMALL = {"clusters": 8, "train_points": 256, "test_points": 128, "hidden": 16, "key_dim": 4}
KINDS = {
    "vq": {"kind": "vq", "codes": 8},
    "vq, gradient": {"kind": "vq", "codes": 8, "codebook": "gradient"},
    "vq, late": {"kind": "vq", "codes": 8, "start_step": 3},
    "simvq": {"kind": "simvq", "codes": 8},
    "fsq": {"kind": "fsq", "levels": [4, 2]},
    "ifsq": {"kind": "ifsq", "levels": [4, 2]},
    "lfq": {"kind": "lfq", "bits": 3},
    "bsq": {"kind": "bsq", "bits": 3},
    "none": {"kind": "none"},
}


def settings(folder="toy", seed=0, steps=6, quantizer=KINDS["vq"], **toy):
    train = {"steps": steps, "batch_size": 64, "lr": 1e-2, "warmup": 1, "log_every": steps}
    tree = {"seed": seed, "run_dir": str(folder), "toy": {**SMALL, **toy, "quantizer": quantizer}, "train": train}
    return validate({**tree, "eval": {"every": None}, "checkpoint": {"every": None}}, ToyRunConfig)


def task(**changes):
    return ToyTask(settings(**changes), torch.device("cpu"))


def trained(**changes):
    """After six optimizer steps in float64, by a loop that fits here."""
    toy = task(**changes)
    toy.model.double()
    toy.points = {split: x.double() for split, x in toy.points.items()}
    optimizer = torch.optim.SGD(toy.model.parameters(), lr=0.1)
    for step in range(6):
        toy.set_step(step)
        optimizer.zero_grad()
        error, own, _ = toy.model.train()(toy.batch(step, range(64), 0).inputs)
        (error + own).backward()
        optimizer.step()
        toy.after_update("model")
    return toy


def test_points_have_the_mixture_s_clusters_and_noise():
    points = mixture(ToyConfig(clusters=4, noise=0.01, dim=6, train_points=500, test_points=100), seed=3)
    assert {split: tuple(x.shape) for split, x in points.items()} == {
        "train": (500, 6),
        "valid": (100, 6),
        "test": (100, 6),
    }
    near = torch.cdist(points["test"], points["train"]) < 0.2  # noise is far below, centres are far above
    assert len(near.unique(dim=0)) == 4, "test points come from the clusters of the training points"
    own = points["train"][near[0]]
    assert own.std(0).mean() == pytest.approx(0.01, rel=0.2)
    assert not torch.equal(points["valid"], points["test"])


def test_batches_depend_on_seed_and_step_alone():
    toy, again = task(), task()
    again.batch(0, range(64), 0)
    x = toy.batch(5, range(64), 0).inputs
    assert torch.equal(x, again.batch(5, range(64), 0).inputs)
    assert torch.equal(x[16:40], toy.batch(5, range(16, 40), 0).inputs), "micro-batches are slices of the batch"
    assert not torch.equal(x, toy.batch(6, range(64), 0).inputs)
    assert not torch.equal(x, task(seed=1).batch(5, range(64), 0).inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains(kind, tmp_path):
    summary = run(settings(tmp_path / "run", quantizer=KINDS[kind]), quiet=True)
    test = summary["test"]
    assert 0 < test["mse"] < 10
    assert ("usage" in test) == (kind != "none")
    assert test.get("codes", 8) == 8


def test_a_run_repeats_to_the_last_bit(tmp_path):
    first, second = (run(settings(tmp_path / name), quiet=True) for name in "ab")
    assert first["test"] == second["test"]
    assert first["test"] != run(settings(tmp_path / "c", seed=1), quiet=True)["test"]


def test_evaluation_equals_its_definition():
    toy = trained(key_scale=3.0, shift=2.0)
    got = toy.evaluate("test", final=True)
    model, x = toy.model.requires_grad_(False), toy.points["test"]
    k = 3 * model.encoder(x) + 2
    c = model.quantizer.codebook[0]
    codes = torch.cdist(k, c).argmin(-1)
    q = c[codes]
    share = torch.bincount(codes, minlength=8) / len(x)
    want = {
        "mse": (model.decoder((q - 2) / 3) - x).square().mean(),
        "usage": (share > 0).double().mean(),
        "perplexity": torch.special.entr(share).sum().exp(),
        "quantization_error": (k - q).square().sum(-1).mean() / 9,
        "key_norm": k.norm(dim=-1).mean(),
        "norm_ratio": (q.norm(dim=-1) / k.norm(dim=-1)).mean(),
        "codes": 8,
    }
    assert {name: got[name] for name in want} == pytest.approx({n: float(v) for n, v in want.items()}, rel=1e-6)


@pytest.mark.parametrize(("estimator", "same"), [("ste", True), ("rotation_centred", True), ("rotation", False)])
def test_shifted_keys_train_alike_where_the_estimator_knows_no_origin(estimator, same):
    """k-means, the Euclidean lookup and the moving averages are translation invariant; angles to the origin are not."""
    quantizer = {"kind": "vq", "codes": 8, "init": "kmeans", "commit": 0.1, "estimator": estimator}
    near, far = (trained(shift=shift, quantizer=quantizer).evaluate("test", True) for shift in (0.0, 10.0))
    assert (near["mse"] == pytest.approx(far["mse"], rel=1e-9)) is same


@pytest.mark.parametrize("estimator", ["ste", "rotation", "rotation_unscaled", "scale"])
def test_long_keys_train_alike_once_the_commitment_follows(estimator):
    """What `toy-norms` rests on: key_scale changes nothing but the first codebook's length beside the keys."""
    results = [
        trained(
            key_scale=scale,
            quantizer={"kind": "vq", "codes": 8, "init": "kmeans", "commit": 0.1 / scale**2, "estimator": estimator},
        ).evaluate("test", True)
        for scale in (1.0, 10.0)
    ]
    for name in ("mse", "usage", "norm_ratio", "quantization_error"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-9), name
