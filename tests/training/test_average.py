"""`train.average`: the mean of the last weights is what is evaluated and kept, and training never notices."""

from __future__ import annotations

import pytest
import torch
from tiny_run import tiny_run
from toy_task import ToyConfig, ToyTask, interrupt_at, records, train_toy

from transformer_vq.config import CheckpointConfig, ConfigError, EvalConfig, validate
from transformer_vq.config.run import TrainConfig
from transformer_vq.data import prepare
from transformer_vq.evaluation import evaluate
from transformer_vq.studies.kinds import digest
from transformer_vq.training import TrainingInterrupted, load_run, run
from transformer_vq.training.average import first_averaged
from transformer_vq.training.checkpoints import load_tensors
from transformer_vq.training.task import EvaluationStopped


class Config(ToyConfig):
    """The toy with the settings of a language model's training."""

    train: TrainConfig = TrainConfig()


def toy(run_dir, steps=12, average=0.34, every=1, keep=99):
    settings = {"steps": steps, "batch_size": 4, "warmup": 2, "log_every": 1, "average": average}
    settings["schedule"] = "constant"
    checkpoint = CheckpointConfig(every=every, keep=keep)
    return Config(run_dir=str(run_dir), train=TrainConfig(**settings), eval=EvalConfig(every=5), checkpoint=checkpoint)


def tensors(run_dir, step, name="model"):
    return load_tensors(run_dir / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    ("steps", "share", "first"), [(12, 0.34, 8), (10, 0.3, 7), (5, 0.01, 4), (7, 1.0, 0), (7, None, 7)]
)
def test_the_share_counts_steps(steps, share, first):
    assert first_averaged(steps, share) == first


def test_what_is_kept_and_scored_is_the_mean_and_training_is_as_without(tmp_path):
    tasks = []
    got = train_toy(toy(tmp_path / "run"), tasks)
    plain = train_toy(toy(tmp_path / "plain", average=None))
    assert got["averaged_steps"] == 4 and "averaged_steps" not in plain
    trained = lambda name: [r for r in records(tmp_path / name) if r["split"] == "train" or r["step"] < 12]
    assert trained("run") == trained("plain")
    last = tensors(tmp_path / "plain", 12)
    assert_equal(tensors(tmp_path / "run", 12, "model-training"), last)
    assert_equal({name: p.detach() for name, p in tasks[0].model.named_parameters()}, last)
    mean = {name: torch.stack([tensors(tmp_path / "plain", i)[name] for i in (9, 10, 11, 12)]).mean(0) for name in last}
    kept = tensors(tmp_path / "run", 12)
    for name, w in mean.items():
        torch.testing.assert_close(kept[name], w)
        assert not torch.equal(kept[name], last[name])
    tasks[0].model.load_state_dict(kept)
    assert got["valid"]["mse"] == tasks[0].evaluate("valid", True)["mse"] != plain["valid"]["mse"]


@pytest.mark.parametrize("at", [4, 7, 8, 10])
def test_resumed_equals_straight_bit_for_bit(tmp_path, monkeypatch, at):
    """Stopped before the steps that are averaged, at their first, and among them."""
    want = train_toy(toy(tmp_path / "straight"), dropout=0.5)
    interrupt_at(monkeypatch, at)
    with pytest.raises(TrainingInterrupted):
        train_toy(toy(tmp_path / "run"), dropout=0.5)
    got = train_toy(toy(tmp_path / "run"), dropout=0.5, resume=True)
    for name in ("model", "model-training", "model-optimizer"):
        assert_equal(tensors(tmp_path / "run", 12, name), tensors(tmp_path / "straight", 12, name))
    assert records(tmp_path / "run") == records(tmp_path / "straight")
    assert (got["valid"], got["averaged_steps"]) == (want["valid"], 4)


def test_a_stop_in_the_last_evaluation_loses_nothing(tmp_path, monkeypatch):
    want = train_toy(toy(tmp_path / "straight"))
    plain, tasks = ToyTask.evaluate, []

    def stopped(self, split, final):
        if final:
            raise EvaluationStopped
        return plain(self, split, final)

    with monkeypatch.context() as patched:
        patched.setattr(ToyTask, "evaluate", stopped)
        with pytest.raises(TrainingInterrupted):
            train_toy(toy(tmp_path / "run"), tasks)
    own = tensors(tmp_path / "run", 12, "model-training")
    assert_equal({name: p.detach() for name, p in tasks[0].model.named_parameters()}, own)  # put back
    assert train_toy(toy(tmp_path / "run"), resume=True)["valid"] == want["valid"]


def test_trained_on_it_goes_on_from_the_weights_themselves(tmp_path):
    train_toy(toy(tmp_path / "run"))
    got = train_toy(toy(tmp_path / "run", steps=18), resume=True)
    train_toy(toy(tmp_path / "straight", steps=18))
    assert got["averaged_steps"] == 6
    for name in ("model", "model-training"):
        assert_equal(tensors(tmp_path / "run", 18, name), tensors(tmp_path / "straight", 18, name))


def test_trained_on_by_less_than_the_share_only_new_steps_count(tmp_path):
    train_toy(toy(tmp_path / "run", average=1.0))
    assert train_toy(toy(tmp_path / "run", steps=14, average=1.0), resume=True)["averaged_steps"] == 2


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_a_language_model_is_loaded_as_it_was_scored(tmp_path, codebook):
    """Learned codes are averaged with the weights; of an EMA codebook everything is that of the last step."""
    settings = {"model__quantizer": {"codes": 8, "codebook": codebook}, "checkpoint__every": None}
    settings |= {"train__steps": 8, "eval__max_tokens": 200}
    config = tiny_run(tmp_path, train__average=0.5, **settings)
    summary, (folder, step) = run(config, quiet=True), (tmp_path / "run", 8)
    loaded = load_run(str(folder))
    split = prepare(config.data).splits["test"]
    assert evaluate(loaded.model, split, batch_size=2)["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-6)
    assert loaded.model.state_dict().keys() == tensors(folder, step).keys()
    run(tiny_run(tmp_path, "plain", **settings), quiet=True)
    last, kept = tensors(tmp_path / "plain", step), tensors(folder, step)
    same = {name for name, w in last.items() if torch.equal(kept[name], w)}
    buffers = {name for name, _ in loaded.model.named_buffers()}
    assert buffers & last.keys() <= same and not same & {name for name, _ in loaded.model.named_parameters()}
    assert (codebook == "ema") == any("ema_sum" in name for name in same)


def test_a_run_without_it_has_the_hash_that_it_had(tmp_path):
    config = tiny_run(tmp_path)
    explicit = tiny_run(tmp_path, train__average=None)
    assert digest(config) == digest(explicit) != digest(tiny_run(tmp_path, train__average=0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"average": 0.0}, "train.average"),
        ({"average": 1.5}, "train.average"),
        ({"average": 0.5, "patience": 2}, "nobody knows which steps are the last"),
        ({"average": 0.5, "shard": "full"}, "not with shard = full"),
    ],
)
def test_what_does_not_go_together_is_one_line(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        validate({"train": settings}, Config)
    assert "\n" not in str(error.value)
