"""Trackers: a resumed run is the same run there."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from toy_task import interrupt_at, toy_config, train_toy

from transformer_vq.training import TrainingInterrupted


@pytest.fixture
def started(monkeypatch) -> list[dict]:
    """What `init` of a tracker that is installed, and does nothing, was told."""
    calls: list[dict] = []
    for name in ("wandb", "trackio"):
        module = ModuleType(name)
        run = SimpleNamespace(log=lambda *a, **k: None, finish=lambda: None)

        def init(which=name, run=run, **given):
            calls.append({"tracker": which} | given)
            return run

        module.init = init
        module.finish, module.config = run.finish, SimpleNamespace(update=lambda *a, **k: None)
        module.__spec__ = SimpleNamespace()
        monkeypatch.setitem(sys.modules, name, module)
    from accelerate import tracking

    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.WANDB, tracking.LoggerType.TRACKIO])
    return calls


def interrupted(config, monkeypatch, at, **flags):
    with monkeypatch.context() as patched:
        interrupt_at(patched, at)
        with pytest.raises(TrainingInterrupted):
            train_toy(config, **flags)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_run_goes_on_under_its_id(tmp_path, monkeypatch, started, name):
    config = toy_config(tmp_path / "run", trackers=[name])
    interrupted(config, monkeypatch, 5)
    interrupted(config, monkeypatch, 9, resume=True)
    (tmp_path / "run").rename(tmp_path / "moved")
    train_toy(toy_config(tmp_path / "moved", trackers=[name]), resume=True)
    train_toy(toy_config(tmp_path / "moved", steps=22, trackers=[name]), resume=True)
    assert [call["tracker"] for call in started] == [name] * 4
    key = {"wandb": "id", "trackio": "name"}[name]
    assert {(call["project"], call["resume"]) for call in started} == {("run", "allow")}
    assert len({call[key] for call in started}) == 1
    train_toy(toy_config(tmp_path / "moved", trackers=[name]), overwrite=True)
    train_toy(toy_config(tmp_path / "other", trackers=[name]))
    assert len({call[key] for call in started}) == 3  # two more runs


def test_tensorboard_goes_on_in_its_folder(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = toy_config(tmp_path / "run", trackers=["tensorboard"], checkpoint={"every": 4})
    interrupted(config, monkeypatch, 5)
    (tmp_path / "run" / "checkpoints" / "step-00000006" / "manifest.json").unlink()  # as if it had been killed
    (tmp_path / "run").rename(tmp_path / "moved")
    config = toy_config(tmp_path / "moved", trackers=["tensorboard"], checkpoint={"every": 4})
    train_toy(config, resume=True)
    assert json.loads((tmp_path / "moved" / "trackers" / "run.json").read_text())["project"] == "run"
    events = EventAccumulator(str(tmp_path / "moved" / "trackers" / "run")).Reload().Scalars("train/loss")
    assert [event.step for event in events] == list(range(1, 21))
