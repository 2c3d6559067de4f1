"""Training on past the planned end: what it equals, what it leaves when it is killed, what is refused."""

import json
import shutil

import pytest
import torch
from toy_task import ToyTask, interrupt_at, records, toy_config, train_toy, weights

from transformer_vq.config import ConfigError
from transformer_vq.training import TrainingInterrupted
from transformer_vq.training import run_folder as folder_module
from transformer_vq.training.schedule import learning_rate


def assert_equal_weights(a, b, step):
    for name, w in weights(b, step).items():
        assert torch.equal(weights(a, step)[name], w), name


def trains(run_dir):
    return [record for record in records(run_dir) if record["split"] == "train"]


@pytest.mark.parametrize("warmup", [0, 2])
def test_ten_steps_extended_to_twenty_are_twenty(tmp_path, warmup):
    settings = {"schedule": "constant", "warmup": warmup, "eval": {"every": 5}, "checkpoint": {"every": 4}}
    want = train_toy(toy_config(tmp_path / "straight", **settings), dropout=0.5)
    train_toy(toy_config(tmp_path / "run", steps=10, **settings), dropout=0.5)
    tasks = []
    got = train_toy(toy_config(tmp_path / "run", steps=20, **settings), tasks, dropout=0.5, resume=True)
    assert min(tasks[0].steps) == 10
    assert_equal_weights(tmp_path / "run", tmp_path / "straight", 20)
    assert records(tmp_path / "run") == records(tmp_path / "straight")
    assert got["valid"] == want["valid"] and got["best"] == want["best"] and got["images"] == want["images"]
    assert train_toy(toy_config(tmp_path / "run", steps=20, **settings), tasks) == got  # and it is finished now
    assert len(tasks) == 1


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_continue_goes_on_as_if_it_had_been_planned_so(tmp_path, monkeypatch, schedule):
    """From the weights of step 10 on, a run planned for 10 does what one planned for 20 would do with them."""
    train_toy(toy_config(tmp_path / "short", steps=10, schedule=schedule))
    interrupt_at(monkeypatch, 9)
    with pytest.raises(TrainingInterrupted):
        train_toy(toy_config(tmp_path / "long", steps=20, schedule=schedule))
    place = tmp_path / "long" / "checkpoints" / "step-00000010"
    shutil.rmtree(place)
    shutil.copytree(tmp_path / "short" / "checkpoints" / "step-00000010", place)
    train_toy(toy_config(tmp_path / "long", steps=20, schedule=schedule), resume=True)
    train_toy(toy_config(tmp_path / "short", steps=20, schedule=schedule), resume=True)
    assert trains(tmp_path / "short")[10:] == trains(tmp_path / "long")[10:]
    planned = toy_config(tmp_path, steps=20, schedule=schedule).train
    assert [r["lr"] for r in trains(tmp_path / "short")[10:]] == [learning_rate(i, planned) for i in range(10, 20)]


def test_restart_warms_up_and_decays_over_the_added_steps(tmp_path):
    short = toy_config(tmp_path / "run", steps=8).train
    train_toy(toy_config(tmp_path / "run", steps=8))
    for steps in (20, 26):
        train_toy(toy_config(tmp_path / "run", steps=steps, extend="restart"), resume=True)
    twelve, six = (toy_config(tmp_path, steps=n).train for n in (12, 6))
    want = [learning_rate(i, short) for i in range(8)]
    want += [learning_rate(i, twelve) for i in range(12)] + [learning_rate(i, six) for i in range(6)]
    assert [r["lr"] for r in trains(tmp_path / "run")] == want


def test_a_restart_does_not_depend_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Extended before its end, stopped twice after: the same run as finished first and extended then."""
    for name in ("straight", "stopped"):
        if name == "stopped":
            interrupt_at(monkeypatch, 5)
            with pytest.raises(TrainingInterrupted, match="after step 6 of 8"):
                train_toy(toy_config(tmp_path / name, steps=8))
        else:
            train_toy(toy_config(tmp_path / name, steps=8))
        config = toy_config(tmp_path / name, steps=20, extend="restart")
        if name == "stopped":
            for at in (6, 13):
                with monkeypatch.context() as patched:
                    interrupt_at(patched, at)
                    with pytest.raises(TrainingInterrupted):
                        train_toy(config, resume=True)
        train_toy(config, resume=True)
    assert_equal_weights(tmp_path / "stopped", tmp_path / "straight", 20)
    lrs = [{r["step"]: r["lr"] for r in trains(tmp_path / name)} for name in ("stopped", "straight")]
    assert lrs[0] == lrs[1]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("extend", ["continue", "restart"])
@pytest.mark.parametrize("moment", ["before the config", "after the config", "first step", "before the summary"])
def test_a_kill_while_it_is_extended_loses_nothing(tmp_path, monkeypatch, moment, extend, old):
    """old: the checkpoint is one that does not say yet what was planned."""
    for name in ("straight", "killed"):
        train_toy(toy_config(tmp_path / name, steps=10, eval={"every": 5}))
        if old:
            forget_plan(tmp_path / name / "checkpoints" / "step-00000010")
        before = (tmp_path / name / "summary.json").read_bytes()
        config = toy_config(tmp_path / name, steps=20, extend=extend, eval={"every": 5})
        if name == "killed":

            def kill(*_, **__):
                raise SystemExit

            place, attribute = {
                "before the config": (folder_module, "save_config"),
                "after the config": (folder_module.RunFolder, "_forget_after"),
                "first step": (ToyTask, "batch"),
                "before the summary": (folder_module.RunFolder, "finish"),
            }[moment]
            with monkeypatch.context() as patched:
                patched.setattr(place, attribute, kill)
                with pytest.raises(SystemExit):
                    train_toy(config, resume=True)
            assert (tmp_path / name / "summary.json").read_bytes() == before
            assert ("steps: 20" in (tmp_path / name / "config.yaml").read_text()) == (moment != "before the config")
        train_toy(config, resume=True)
    assert_equal_weights(tmp_path / "killed", tmp_path / "straight", 20)
    assert records(tmp_path / "killed") == records(tmp_path / "straight")


def forget_plan(checkpoint) -> None:
    """As checkpoints were before."""
    from transformer_vq.training.checkpoints import sha256

    path, manifest = checkpoint / "trainer.json", json.loads((checkpoint / "manifest.json").read_text())
    values = json.loads(path.read_text())
    del values["planned"], values["restarts"]
    path.write_text(json.dumps(values))
    manifest["files"]["trainer.json"] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_what_is_refused(tmp_path, monkeypatch):
    train_toy(toy_config(tmp_path / "run", steps=10))
    with pytest.raises(ConfigError, match=r"another config \(train\.steps: 10 -> 20\); --resume to train that run on"):
        train_toy(toy_config(tmp_path / "run", steps=20))
    with pytest.raises(ConfigError, match=r"another config \(train\.lr: 0\.001 -> 0\.5; train\.steps: 10 -> 20\)"):
        train_toy(toy_config(tmp_path / "run", steps=20, lr=0.5), resume=True)
    with pytest.raises(ConfigError, match=r"train\.steps = 9: the run in .* has made 10 of 10 steps; --resume takes"):
        train_toy(toy_config(tmp_path / "run", steps=9), resume=True)
    with pytest.raises(ConfigError, match=r"another config \(train\.extend: continue -> restart\)"):
        train_toy(toy_config(tmp_path / "run", steps=10, extend="restart"), resume=True)
    interrupt_at(monkeypatch, 13)
    with pytest.raises(TrainingInterrupted, match="after step 14 of 20"):
        train_toy(toy_config(tmp_path / "run", steps=20, extend="restart"), resume=True)
    with pytest.raises(ConfigError, match="an unfinished run, with a checkpoint of step 14; --resume to go on"):
        train_toy(toy_config(tmp_path / "run", steps=20, extend="restart"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 10
    assert train_toy(toy_config(tmp_path / "run", steps=20, extend="restart"), resume=True)["steps"] == 20
