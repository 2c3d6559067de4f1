"""`train.teacher`: another run's predictions are learned, whatever the cut of the batch; runs that begin at step 0."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_same
from tiny_run import tiny_run

from transformer_vq.config import ConfigError
from transformer_vq.models import TransformerVQ
from transformer_vq.training import load_run, run
from transformer_vq.training.imported import write_run


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A folder with a finished run to learn from."""
    folder = tmp_path_factory.mktemp("taught")
    run(tiny_run(folder, "teacher", train__steps=15), quiet=True)
    return folder


def student(folder, name, **changes):
    return tiny_run(folder, name, seed=5, train__teacher=str(folder / "teacher"), train__steps=6, **changes)


def records(config, split="train"):
    text = (Path(config.run_dir) / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [line for line in lines if line["split"] == split]


def test_the_loss_is_the_divergence_from_the_teacher(taught):
    config = student(taught, "kl")
    run(config, quiet=True)
    first = records(config)[0]
    from transformer_vq.training import LanguageTask

    task = LanguageTask(config, torch.device("cpu"))
    batch = task.batch(0, range(4), 0).inputs
    p = load_run(str(taught / "teacher")).model(batch.tokens).logits.softmax(-1)
    log_q = task.model.train()(batch.tokens).logits.log_softmax(-1)
    want = (p * (p.log() - log_q)).sum(-1).mean().item()
    assert first["loss_teacher"] == pytest.approx(want, rel=1e-5)
    assert first["loss"] == pytest.approx(want, rel=0.05) and first["loss_lm"] > 1  # beside it, commitment
    assert records(config)[-1]["loss_teacher"] < first["loss_teacher"]


@pytest.mark.parametrize("share", [pytest.param(1.0, marks=pytest.mark.slow), 0.5])
def test_micro_batches_do_not_show(taught, share):
    whole, cut = (
        student(taught, f"{share}-{size}", train__teacher_share=share, train__micro_batch=size) for size in (4, 2)
    )
    for config in (whole, cut):
        run(config, quiet=True)
    a, b = (load_run(config.run_dir).model.state_dict() for config in (whole, cut))
    assert_same(
        {k: v for k, v in a.items() if v.is_floating_point()}, {k: b[k] for k in a if b[k].is_floating_point()}, 1e-3
    )


def test_a_teacher_inside_the_run_moves_with_it(taught, tmp_path):
    config = tiny_run(tmp_path, "run", train__teacher="teacher", train__steps=2, data__source=str(taught / "text.txt"))
    (tmp_path / "run").mkdir()
    (taught / "teacher").rename(tmp_path / "run" / "teacher")
    try:
        run(config, quiet=True)
        (tmp_path / "run").rename(tmp_path / "moved")
        moved = config.model_copy(
            update={"run_dir": str(tmp_path / "moved"), "train": config.train.model_copy(update={"steps": 3})}
        )
        assert run(moved, resume=True, quiet=True)["steps"] == 3
    finally:
        (tmp_path / "moved" / "teacher").rename(taught / "teacher")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__teacher": "nowhere"}, "train.teacher = nowhere: there is no run folder nowhere"),
        ({"data__order": "streams"}, "train.teacher: needs data.order: windows"),
        ({"data__tokenizer": "bpe:300"}, "256 rows of logits; this model .*they must be the same"),
        ({"train__teacher_share": 0.0}, "train.teacher_share = 0.0"),
    ],
    ids=str,
)
def test_what_cannot_be_learned_from_is_refused(taught, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(tiny_run(tmp_path, "run", **{"train__teacher": str(taught / "teacher"), **changes}), quiet=True)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_model_that_was_brought_in_is_where_training_begins(tmp_path):
    config = tiny_run(tmp_path, "run", train__steps=1, train__lr=1e-12)
    model = TransformerVQ(config.model.model_copy(update={"vocab_size": 256}), seed=77)
    write_run(model, config, tmp_path / "run")
    run(config, resume=True, quiet=True)
    got, want = load_run(config.run_dir).model.state_dict(), model.state_dict()
    assert_same({"head": got["head.weight"]}, {"head": want["head.weight"]}, rtol=1e-6)
