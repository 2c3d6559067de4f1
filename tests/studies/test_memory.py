"""A study is said not to fit where its largest run does not."""

from __future__ import annotations

import pytest
from image_cases import run_config
from peaks import peaks_of_steps
from tiny_run import tiny_run

from transformer_vq.cli import run as command
from transformer_vq.cli.describe import vocabulary as describe_vocabulary
from transformer_vq.config import save_config, validate
from transformer_vq.config.recall import RecallRunConfig
from transformer_vq.config.toy import ToyRunConfig
from transformer_vq.images import memory as of_images
from transformer_vq.images.pictures import Shape
from transformer_vq.studies import memory
from transformer_vq.studies.plan import load_study
from transformer_vq.studies.toy import run
from transformer_vq.training import memory as of_training


def vocabulary(tokenizer: str) -> int:
    return 256


@pytest.fixture
def make(tmp_path):
    """A study of a base, whose arms differ in one setting."""

    def study(base, key, values, metric="mse"):
        save_config(base, tmp_path / "base.yaml")
        lines = [f"base: {tmp_path}/base.yaml", f"run_dir: {tmp_path}/study", "seeds: [1, 2]"]
        lines += [f"factors: {{{key}: {values}}}", f"metrics: {{{metric}: min}}"]
        (tmp_path / "study.yaml").write_text("\n".join(lines))
        return load_study(tmp_path / "study.yaml")

    return study


def said(study, there, monkeypatch, at_once=1):
    monkeypatch.setattr(of_training, "available", lambda device: there)
    return memory.complaint(study, "cpu", at_once, vocabulary)


def test_the_largest_arm_is_named(make, tmp_path, monkeypatch):
    base = tiny_run(tmp_path)
    study = make(base, "train.seq_len", [24, 96, 48], metric="bits_per_byte")
    wide = base.model_copy(
        update={
            "model": base.model.model_copy(update={"vocab_size": 256}),
            "train": base.train.model_copy(update={"seq_len": 96}),
        }
    )
    needed = of_training.training_memory(wide, "cpu").total
    assert said(study, 2**40, monkeypatch) is None
    assert said(study, needed, monkeypatch) is None
    line = said(study, needed - 1, monkeypatch)
    assert "96" in line and "the largest" in line and "may not fit" in line
    assert "at once" not in line and "2 of them at once" in said(study, 2 * needed - 1, monkeypatch, at_once=2)
    assert said(study, 2 * needed, monkeypatch, at_once=2) is None
    assert said(study, 6 * needed, monkeypatch, at_once=100) is None  # there are six runs


def test_pictures_are_not_downloaded(make, tmp_path, monkeypatch):
    base = run_config(tmp_path / "r", data={"source": "cifar10", "size": 16})
    study = make(base, "images.width", [8, 32])
    wide = run_config(tmp_path / "r", {"width": 32}, data={"source": "cifar10", "size": 16})
    needed = of_images.step_memory(wide, Shape(3, 16, 16), "cpu").total
    assert said(study, needed, monkeypatch) is None
    assert "32" in said(study, needed - 1, monkeypatch)
    unknown = make(run_config(tmp_path / "r", data={"source": "cifar10"}), "images.width", [8, 32])
    assert said(unknown, 1, monkeypatch) is None


@pytest.mark.parametrize("tokenizer", ["hf:gpt2", "tiktoken:gpt2", "nowhere/tokenizer.json", "empty.json"])
def test_tokenizers_are_not_downloaded_and_may_be_missing(tokenizer, make, tmp_path, monkeypatch):
    (tmp_path / "empty.json").write_text("")
    monkeypatch.chdir(tmp_path)
    study = make(tiny_run(tmp_path, data__tokenizer=tokenizer), "train.seq_len", [24, 48], metric="bits_per_byte")
    monkeypatch.setattr(of_training, "available", lambda device: 1)
    assert memory.complaint(study, "cpu", 1, describe_vocabulary) is None


def test_recall_runs_are_told_of():
    text = memory.as_text(RecallRunConfig(), vocabulary)
    assert text.model.vocab_size == RecallRunConfig().recall.vocab and text.data.order == "windows"


@pytest.mark.parametrize("quantizer", [{"codes": 64}, {"codes": 4096, "estimator": "gumbel", "codebook": "gradient"}])
def test_a_step_of_the_toy_takes_what_is_said(quantizer, tmp_path, monkeypatch):
    toy = {"train_points": 4096, "test_points": 16, "hidden": 256, "quantizer": quantizer}
    train = {"steps": 2, "batch_size": 2048, "warmup": 1, "log_every": 1}
    config = validate({"run_dir": str(tmp_path / "r"), "toy": toy, "train": train}, ToyRunConfig)
    said = memory.toy_memory(config, "cpu")
    assert memory.toy_roughly(config) > said
    found = peaks_of_steps(monkeypatch)
    run(config, quiet=True)
    assert said == pytest.approx(found[-1] + memory.points(config), rel=0.2)


def test_dry_run_says_it(make, tmp_path, monkeypatch, capsys):
    make(tiny_run(tmp_path), "train.seq_len", [24, 48], metric="bits_per_byte")
    monkeypatch.setattr(of_training, "available", lambda device: 1000)
    assert command(["study", "run", str(tmp_path / "study.yaml"), "--dry-run"]) == 0
    assert "a step of" in " ".join(capsys.readouterr().out.split())
