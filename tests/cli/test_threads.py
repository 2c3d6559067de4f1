"""How threads wait: looked at before PyTorch is imported, and only where nobody has said it."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import psutil
import pytest

from transformer_vq.cli import run, threads


@pytest.fixture
def fresh(monkeypatch):
    """A process that has not imported PyTorch, with nothing said about threads."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 93.0)
    return monkeypatch


def test_on_a_busy_machine_they_sleep_and_it_is_said(fresh, capsys):
    threads.settle_threads(quiet=False)
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    out, said = capsys.readouterr()
    assert out == "" and said.startswith("threads") and "others take 93 % of this machine" in said


def test_quiet_is_quiet(fresh, capsys):
    threads.settle_threads(quiet=True)
    assert os.environ["OMP_WAIT_POLICY"] == "passive" and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS"])
def test_a_word_of_the_users_stands(fresh, capsys, name):
    fresh.setenv(name, "1")
    threads.settle_threads(quiet=False)
    assert os.environ.get("OMP_WAIT_POLICY", "1") == "1" and capsys.readouterr().err == ""


def test_on_an_idle_machine_they_wait_a_little(fresh, capsys):
    fresh.setattr(psutil, "cpu_percent", lambda interval: 12.0)
    threads.settle_threads(quiet=False)
    assert "OMP_WAIT_POLICY" not in os.environ and capsys.readouterr().err == ""
    assert os.environ["GOMP_SPINCOUNT"] == "10000"


def test_benchmarks_wait_as_training_does(fresh):
    seen = []
    measure = import_module("transformer_vq.cli.bench")  # the package has the command group by that name
    fresh.setattr(measure, "_measure", lambda *_, **__: seen.append(os.environ.get("GOMP_SPINCOUNT")))
    assert run(["bench", "quantize"]) == 0 and seen == ["10000"]


def test_once_torch_is_there_it_is_too_late(fresh):
    fresh.setitem(sys.modules, "torch", object())
    threads.settle_threads(quiet=False)
    assert "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ
