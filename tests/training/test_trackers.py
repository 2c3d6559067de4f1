"""Trackers: a resumed run is the same run there."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import matplotlib
import pytest
from tiny_run import tiny_run
from toy_task import interrupt_at, toy_config, train_toy

from transformer_vq.training import TrainingInterrupted, language, trackers


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


# Histograms and pictures of codes


def evaluated_run(folder, monkeypatch, *trackers: str) -> None:
    """A language model, evaluated after steps 5, 10, 15 and, twice, 20; no tracker may reach a network."""
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(folder))
    language.run(tiny_run(folder, train__trackers=list(trackers), eval__every=5), quiet=True)


SHOWN = {f"valid/layer{i}/{what}" for i in (0, 1) for what in ("code_share", "norm_ratio", "angle")}


def test_tensorboard_shows_codes(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    evaluated_run(tmp_path, monkeypatch, "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "run"), {"histograms": 0, "images": 0}).Reload()
    names = events.Tags()
    assert set(names["histograms"]) == SHOWN | {name.replace("valid", "test") for name in SHOWN}
    assert set(names["images"]) == {"valid/codes", "test/codes"}
    share = [event.histogram_value for event in events.Histograms("valid/layer0/code_share")]
    assert [e.step for e in events.Images("valid/codes")] == [5, 10, 15, 20] and len(share) == 4
    assert all(sum(one.bucket) == pytest.approx(1) for one in share)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    last = events.Histograms("valid/layer1/angle")[-1].histogram_value
    assert sum(last.bucket) == last.num >= summary["valid"]["bytes"]  # one key head: a key a byte


def test_wandb_shows_codes_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    evaluated_run(tmp_path, monkeypatch, "wandb")
    (folder,) = (tmp_path / "run" / "trackers" / "wandb").glob("offline-run-*")
    assert len(list(folder.glob("files/media/images/valid/codes_*.png"))) == 4
    (path,) = folder.glob("run-*.wandb")
    marks = re.findall(rb'(valid/layer\d/\w+)\x12\x05_type\x82\x01\x0b"histogram"', path.read_bytes())
    assert {mark.decode() for mark in marks} == SHOWN and len(marks) >= 4 * len(
        SHOWN
    ) - 2  # a block's border may cut one


@pytest.mark.slow
def test_trackio_shows_codes_offline(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    script = """
import sys
from pathlib import Path
from tiny_run import tiny_run
from transformer_vq.training import language
language.run(tiny_run(Path(sys.argv[1]), train__trackers=["trackio"], eval__every=5), quiet=True)
"""
    own = {"HOME": str(tmp_path), "MPLCONFIGDIR": matplotlib.get_configdir(), "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **own, "PYTHONPATH": os.pathsep.join(sys.path)}  # its folder is read once, on import
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, check=True, timeout=280)
    with sqlite3.connect(tmp_path / "store" / "run.db") as store:
        rows = [json.loads(metrics) for (metrics,) in store.execute("SELECT metrics FROM metrics")]
    kinds = {key: value["_type"] for row in rows for key, value in row.items() if isinstance(value, dict)}
    assert {key for key, kind in kinds.items() if kind == "trackio.histogram"} >= SHOWN
    assert kinds["valid/codes"] == "trackio.image" and any("train/loss" in row for row in rows)


def test_without_trackers_nothing_is_listened_to(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(trackers.KeyHistograms, "__init__", lambda self, quantizers: heard.append(len(quantizers)))
    monkeypatch.setattr(trackers.KeyHistograms, "__enter__", lambda self: self)
    monkeypatch.setattr(trackers.KeyHistograms, "__exit__", lambda self, *_: None)
    monkeypatch.setattr(trackers.KeyHistograms, "histograms", lambda self: {})
    evaluated_run(tmp_path, monkeypatch)
    assert heard == [0] * 5


def test_what_is_shown_is_bounded():
    assert list(trackers.spaced({str(i): i for i in range(48)}, 8)) == ["0", "7", "13", "20", "27", "34", "40", "47"]
    assert trackers.spaced({"a": 1}, 8) == {"a": 1} and trackers.spaced({}, 8) == {}
    main = SimpleNamespace(is_main_process=True)
    for planned in (0, 1, 25, 26, 1000):
        kept = trackers.Trackers(main, None, ["tensorboard"], planned)
        heard = sum(bool(kept.listening(lambda: {"a": 1}, n, final=False).quantizers) for n in range(1, planned + 1))
        assert min(planned, 13) <= heard <= trackers.EVALUATIONS
        assert kept.listening(lambda: {"a": 1}, 7, final=True).quantizers
    other = trackers.Trackers(SimpleNamespace(is_main_process=False), None, ["tensorboard"], 1)
    assert other.listening(lambda: {"a": 1}, 1, final=True).quantizers  # evaluations are shared: each hears its part
