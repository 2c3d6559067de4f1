"""A run that stands still ends, and says whose fault it is."""

from __future__ import annotations

import re
import threading
import time

import pytest
from many_processes import torchrun

from transformer_vq.clock import Clock, spent
from transformer_vq.training import watch as module
from transformer_vq.training.watch import Stand, Watch, behind, within


def stand(steps: int, stage: str, talks: bool = False, still: float = 9.0) -> Stand:
    return Stand(1, still, steps, stage, talks, "host")


@pytest.mark.parametrize(
    ("stands", "to_blame"),
    [
        ([stand(5, "data", talks=True), stand(5, "data")], [1]),  # one reads, the other waits in the first sum
        ([stand(5, "backward"), stand(5, "passes"), stand(5, "passes")], [1, 2]),  # gradients of 0 are waited for
        ([stand(6, "checkpoint"), stand(6, "checkpoint", talks=True)], [0]),  # the main process writes
        ([stand(6, ""), stand(6, "checkpoint", talks=True)], [0]),
        ([stand(6, "data"), stand(5, "update")], [1]),
        ([stand(6, "evaluation", talks=True), stand(6, "data", talks=True)], [0]),  # all wait: they do not do the same
        ([stand(5, "backward"), stand(5, "backward")], [0, 1]),
    ],
)
def test_who_is_to_blame(stands, to_blame):
    assert behind(dict(enumerate(stands))) == to_blame


class Store(dict):
    """Of a process group."""

    check = lambda self, keys: all(key in self for key in keys)
    get = dict.__getitem__
    set = dict.__setitem__

    def add(self, key, n):
        self[key] = self.get(key) + n if key in self else n
        return self[key]


class Ended(Exception):
    pass


@pytest.fixture
def watches(monkeypatch):
    """Three, of processes that share a store; they are told of each second by hand."""

    def end(self, complaint):
        raise Ended(complaint)

    monkeypatch.setattr(Watch, "_end", end)
    monkeypatch.setattr(module, "SILENT", 1)
    watches = [Watch(Clock(()), lambda: 5, rank, 3, timeout=8.0) for rank in range(3)]
    for one in watches:
        one.still, one.host = 9.0, "node"
    return watches


def judge(one: Watch, store: Store, others: list[Watch], monkeypatch) -> None:
    """While `one` waits for an answer, the others look once."""

    def look(pause):
        for other in others:
            other._tell(store, "w/")
        return False

    monkeypatch.setattr(one.ended, "wait", look)
    one._judge(store, "w/")


def test_the_one_that_reads_is_named(watches, monkeypatch):
    store = Store()
    with watches[0].clock.running(), spent("data"), spent("communication"):
        watches[0]._tell(store, "w/")
    with watches[1].clock.running(), spent("data"):
        watches[2].clock.within = ("data", "communication")
        watches[0].clock.within = ("data", "communication")
        with pytest.raises(Ended, match=r"process 1 on node \(reading a batch, 5 steps done\) has not"):
            judge(watches[0], store, watches[1:], monkeypatch)
        with pytest.raises(Ended, match="None"):  # said once
            judge(watches[2], store, watches[:2], monkeypatch)
        watches[1].still = 2.0  # it has just got on: a long evaluation, say
        judge(watches[0], store, watches[1:], monkeypatch)


def test_who_tells_nothing_is_named(watches, monkeypatch):
    store = Store()
    for one in watches:
        one._tell(store, "w/")
    with pytest.raises(Ended, match=r"process 1 on node .* has been silent"):
        judge(watches[0], store, [watches[2]], monkeypatch)
    store = Store()
    with pytest.raises(Ended, match=r"^process 1, process 2 have been silent"):  # these never said a word
        judge(watches[0], store, [], monkeypatch)


def test_nobody_is_ended_who_gets_on(watches, monkeypatch):
    store = Store()
    monkeypatch.setattr(watches[0].ended, "wait", lambda pause: watches[0].clock.beat())
    watches[0]._judge(store, "w/")
    monkeypatch.setattr(watches[0].ended, "wait", lambda pause: True)
    watches[0]._judge(store, "w/")


def test_alone_only_a_checkpoint_is_watched(monkeypatch):
    said, ended = [], threading.Event()

    def end(self, complaint):
        said.append(complaint)
        ended.set()
        self.ended.set()

    monkeypatch.setattr(Watch, "_end", end)
    one = Watch(Clock(()), lambda: 7, 0, 1, timeout=0.2)
    with one.clock.running(), one.watching():
        with spent("passes"):
            assert not ended.wait(0.6)
        with spent("checkpoint"):
            assert ended.wait(30)
    assert re.fullmatch(r"process 0 on .* \(writing a checkpoint, 7 steps done\) has not got on for .* = 0.2 s", *said)
    with Watch(Clock(()), lambda: 0, 0, 1, timeout=None).watching():
        assert len(said) == 1


def test_a_store_that_is_gone_is_the_launchers_affair(monkeypatch):
    class Gone(Store):
        def set(self, key, value):
            raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(Watch, "_end", lambda self, complaint: pytest.fail(complaint))
    assert Watch(Clock(()), lambda: 5, 0, 2, timeout=8.0)._tell(Gone(), "w/") is False


def test_a_store_that_does_not_answer():
    assert within(20, lambda: 3) == 3
    forever = threading.Event()
    assert within(0.05, forever.wait) is None
    forever.set()


STALLED = """
import os, signal, sys, time
from pathlib import Path
from tiny_run import tiny_run
from transformer_vq.cli import run as command
from transformer_vq.config import save_config
from transformer_vq.training import LanguageTask, snapshot
folder, what, rank = Path(sys.argv[1]), sys.argv[2], os.environ["RANK"]
def stand_still(seconds=300):
    if what == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(seconds)
def hang(place, name, when):
    whole = getattr(place, name)
    def patched(*args, **options):
        if when(*args):
            stand_still()
        return whole(*args, **options)
    setattr(place, name, patched)
if what == "checkpoint" and rank == "0":
    hang(snapshot, "save_tensors", lambda *_: True)
if what != "checkpoint" and rank == "1":
    place = {"data": "batch", "stopped": "losses", "passes": "losses", "evaluation": "evaluate"}[what]
    hang(LanguageTask, place, lambda self, step, *_: step == 3 if what == "data" else True)
config = tiny_run(folder, train__timeout=4, checkpoint__every=6, eval__every=6)
path = folder / f"config-{rank}.yaml"
save_config(config, path)
sys.exit(command(["train", str(path), "--quiet"]))
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("what", "who"),
    [
        ("data", r"process 1 on \S+ \(reading a batch, 3 steps done\) has not got on"),
        ("passes", r"process 1 on \S+ \(in a forward or backward pass, 0 steps done\) has not got on"),
        ("stopped", r"process 1 on \S+ \(.*, 0 steps done\) has been silent, stopped or out of reach,"),
        ("checkpoint", r"process 0 on \S+ \(writing a checkpoint, 6 steps done\) has not got on"),
        ("evaluation", r"process 1 on \S+ \(evaluating, 6 steps done\) has not got on"),
    ],
)
def test_a_process_that_stands_still_ends_the_run(tmp_path, what, who):
    script = tmp_path / "stalled.py"
    script.write_text(STALLED)
    began = time.monotonic()
    said = torchrun(2, str(script), str(tmp_path), what, fails=True)
    assert time.monotonic() - began < 120  # of which torchrun waits 30 for the one that is stopped
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert re.search(rf"^error: {who} for train.timeout = 4 s; the run is ended. .* --resume goes on", line), line
