"""What the loop answers to SIGUSR1 and SIGTERM, and how soon."""

import os
import signal

import pytest
import torch
from tiny_run import tiny_run
from toy_task import ToyTask, interrupt_at, records, toy_config, train_toy, weights

from transformer_vq.training import TrainingInterrupted, run
from transformer_vq.training import signals as module
from transformer_vq.training.language import LanguageTask


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(LanguageTask, "finish", lambda self, folder: None)  # most of a tiny run's time


usr1 = pytest.mark.skipif(module.CHECKPOINT is None, reason="this system has no SIGUSR1")


def steps(run_dir) -> list[int]:
    return sorted(int(path.name[-8:]) for path in (run_dir / "checkpoints").glob("step-*"))


@usr1
def test_usr1_writes_a_checkpoint_and_training_goes_on(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGUSR1)
    settings = {"checkpoint": {"every": None, "keep": 9}}
    interrupt_at(monkeypatch, 6, signal.SIGUSR1)
    train_toy(toy_config(tmp_path / "run", **settings))
    assert steps(tmp_path / "run") == [7, 20]
    train_toy(toy_config(tmp_path / "quiet", **settings))
    assert records(tmp_path / "run") == records(tmp_path / "quiet")
    assert signal.getsignal(signal.SIGUSR1) == before


@usr1
@pytest.mark.parametrize("final", [False, True])
def test_usr1_during_an_evaluation(tmp_path, monkeypatch, final):
    worse = iter(range(9))  # none is better than the first

    def signalled(self, split, last):
        if last == final:
            os.kill(os.getpid(), signal.SIGUSR1)
        return {"mse": float(next(worse))}

    monkeypatch.setattr(ToyTask, "evaluate", signalled)
    config = toy_config(tmp_path / "run", checkpoint={"every": None, "keep": 9}, eval={"every": 8})
    assert train_toy(config)["steps"] == 20
    assert steps(tmp_path / "run") == ([8, 20] if final else [8, 16, 20])


@usr1
def test_a_handler_that_is_there_stays(tmp_path, monkeypatch):
    """Job launchers requeue by it."""
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        interrupt_at(monkeypatch, 6, signal.SIGUSR1)
        train_toy(toy_config(tmp_path / "run", checkpoint={"every": None, "keep": 9}))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1] and steps(tmp_path / "run") == [20]


def test_a_system_without_usr1(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHECKPOINT", None)
    assert train_toy(toy_config(tmp_path / "run"))["steps"] == 20


def test_term_is_answered_between_micro_batches(tmp_path, monkeypatch):
    """The step is given up, and made anew after the resume."""
    settings = {"micro_batch": 1, "checkpoint": {"every": None}}
    losses, seen = ToyTask.losses, []

    def counted(self, player, module, batch):
        seen.append(batch.slot)
        if len(seen) == 4 * 9 + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(self, player, module, batch)

    with monkeypatch.context() as patched:
        patched.setattr(ToyTask, "losses", counted)
        with pytest.raises(TrainingInterrupted, match="after step 9 of 20"):
            train_toy(toy_config(tmp_path / "run", **settings), dropout=0.5)
    assert seen[-2:] == [0, 1]
    train_toy(toy_config(tmp_path / "run", **settings), dropout=0.5, resume=True)
    train_toy(toy_config(tmp_path / "straight", **settings), dropout=0.5)
    assert records(tmp_path / "run") == records(tmp_path / "straight")
    for name, w in weights(tmp_path / "straight", 20).items():
        assert torch.equal(weights(tmp_path / "run", 20)[name], w), name


def test_before_the_first_step_there_is_nothing_to_keep(tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 0, signal.SIGTERM)
    config = toy_config(tmp_path / "run", micro_batch=1)
    with pytest.raises(TrainingInterrupted, match="before the first step was done; there is nothing to go on from"):
        train_toy(config)
    assert train_toy(config, resume=True)["steps"] == 20


def test_streams_stand_where_they_stood_before_a_step_that_is_given_up(tmp_path, monkeypatch):
    """Carried states and codebook statistics of half a step are forgotten."""
    settings = {
        "data__order": "streams", "train__micro_batch": 2, "train__steps": 8, "model__quantizer": {
            "codes": 8, "init": "kmeans", "dead_code_threshold": 0.5}
    }  # fmt: skip
    losses, seen = LanguageTask.losses, []

    def counted(self, player, module, batch):
        out = losses(self, player, module, batch)
        seen.append(batch.slot)
        if len(seen) == 2 * 5 + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return out

    with monkeypatch.context() as patched:
        patched.setattr(LanguageTask, "losses", counted)
        with pytest.raises(TrainingInterrupted, match="after step 5 of 8"):
            run(tiny_run(tmp_path, **settings), quiet=True)
    run(tiny_run(tmp_path, **settings), quiet=True, resume=True)
    run(tiny_run(tmp_path, "straight", **settings), quiet=True)
    for name, w in weights(tmp_path / "straight", 8).items():
        assert torch.equal(weights(tmp_path / "run", 8)[name], w), name


@pytest.mark.parametrize(("number", "final"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_an_evaluation_stops_after_one_batch(tmp_path, monkeypatch, number, final):
    """One language model, three evaluations of many batches; the signal comes in the middle of the first or second."""
    settings = {"train__steps": 4, "eval__every": 2, "eval__context": 4, "eval__batch_size": 1}
    settings["data__max_eval_bytes"] = 100
    check, seen, at = LanguageTask.check_stop, [], [0]

    def counted(self, done=0, total=0):
        seen.append(done)
        if len(seen) == at[0]:
            os.kill(os.getpid(), number)
        check(self, done, total)

    monkeypatch.setattr(LanguageTask, "check_stop", counted)
    want = run(tiny_run(tmp_path, "straight", **settings), quiet=True)
    per_evaluation = len(seen) // 3
    assert per_evaluation > 20
    seen.clear()
    at[0] = 5 + per_evaluation * final
    step = 4 if final else 2
    with pytest.raises(TrainingInterrupted, match=rf"in the evaluation after step {step} of 4; .* --resume goes on"):
        run(tiny_run(tmp_path, **settings), quiet=True)
    assert len(seen) == at[0]
    got = run(tiny_run(tmp_path, **settings), quiet=True, resume=True)
    assert got["test"] == want["test"] and got["valid"] == want["valid"]
    assert records(tmp_path / "run") == records(tmp_path / "straight")
