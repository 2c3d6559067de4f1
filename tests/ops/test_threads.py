"""Threads of our own change nothing but the time: the definition's numbers, the same bits in every run."""

from __future__ import annotations

import ctypes
import os
import threading

import pytest
import torch
from attention_cases import NATIVE, attention_case, call, run
from helpers import assert_same

from transformer_vq.ops.attention import blocks, blockwise, native
from transformer_vq.ops.threads import outer_threads, share, together

SHAPES = {
    "heads": {"H": 4, "Hkv": 4, "B": 1},
    "rows": {"H": 1, "Hkv": 1, "B": 4, "segments": True, "rotary": True},
    "query heads of one key head": {"H": 4, "Hkv": 1, "B": 1, "bias": (1, 21)},
    "query heads, rotary": {"H": 6, "Hkv": 1, "B": 1, "rotary": True, "mask": "random"},
    "a bias of all rows": {"H": 2, "Hkv": 2, "B": 3, "bias": (1, 1)},
    "a bias of all rows, query heads": {"H": 4, "Hkv": 1, "B": 2, "bias": (1, 21), "cache": False},
    "nothing to share": {"H": 1, "Hkv": 1, "B": 1},
}


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(blockwise, "WORTH_A_THREAD", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("backend", "rows"), [("blockwise", 20), ("blockwise", 4096), pytest.param("native", 20, marks=NATIVE.marks)]
)
@pytest.mark.parametrize("gradients", ["window", "block"])
@pytest.mark.parametrize("name", SHAPES)
def test_equal_the_definition_and_themselves(name, gradients, backend, rows, two_threads, monkeypatch):
    monkeypatch.setitem(blocks.ROWS, "cpu", rows)
    seen = []
    monkeypatch.setattr(blockwise, "share", lambda items, begin, n: seen.append(len(items)) or share(items, begin, n))
    monkeypatch.setattr(native, "together", lambda f, job, n: seen.append(job._obj.count) or together(f, job, n))
    case = attention_case(T=21, gradients=gradients, **SHAPES[name])
    got = run(case, backend)
    assert len(seen) == 2 and min(seen) >= (1 if name == "nothing to share" else 2)
    assert_same(got, run(case, "quadratic"), rtol=1e-10)
    assert_same(run(case, backend), got, rtol=0.0)
    with torch.inference_mode():
        assert torch.equal(call(case, backend=backend)[0], got["o"])


def test_little_work_and_one_thread_start_none(two_threads, monkeypatch):
    case = attention_case(T=21)
    torch.set_num_threads(1)
    assert outer_threads(case.tensors["q"]) == 1
    monkeypatch.setattr("transformer_vq.ops.threads._pool", lambda _: pytest.fail("a thread was started"))
    run(case, "blockwise")
    torch.set_num_threads(2)
    monkeypatch.setattr(blockwise, "WORTH_A_THREAD", 2**20)
    run(case, "blockwise")


def test_each_thread_begins_once_and_has_one_thread_inside(two_threads):
    begun, inside = [], set()
    meeting = threading.Barrier(2)

    def begin():
        begun.append(threading.get_ident())
        meeting.wait(timeout=20)
        return lambda _: inside.add((torch.get_num_threads(), torch.is_grad_enabled()))

    share(range(7), begin, 2)
    assert len(set(begun)) == 2 and inside == {(1, False)}
    assert torch.get_num_threads() == 2


def test_an_error_of_a_thread_arrives(two_threads):
    def begin():
        def work(item):
            if item == 3:
                raise ValueError("three")

        return work

    with pytest.raises(ValueError, match="three"):
        share(range(5), begin, 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_starts_its_own(two_threads):
    share(range(4), lambda: lambda _: None, 2)
    child = os.fork()
    if child == 0:
        share(range(4), lambda: lambda _: None, 2)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_scratch_that_a_thread_keeps_is_read_by_nobody_before_it_is_written(monkeypatch):
    monkeypatch.setattr(blocks, "_lasting", threading.local())
    case = attention_case(T=40, H=2, Hkv=1, rotary=True, segments=True, mask="random")
    with torch.inference_mode():  # what is made here is written to by all later calls
        call(case, backend="blockwise")
    want = run(case, "blockwise")
    kept = blocks._lasting.__dict__
    assert kept and all(x.numel() <= blocks.KEPT for x in kept.values())
    for x in kept.values():
        x.fill_(float("nan"))
    assert_same(run(case, "blockwise"), want, rtol=0.0)
    monkeypatch.setattr(blocks, "_lasting", threading.local())
    monkeypatch.setattr(blocks, "KEPT", 0)
    assert_same(run(case, "blockwise"), want, rtol=0.0)
    assert not blocks._lasting.__dict__


def test_a_compiled_function_is_called_in_every_thread(two_threads):
    begun, meeting = [], threading.Barrier(2)

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def function(argument):
        meeting.wait(60)
        begun.append((threading.get_ident(), argument))

    together(function, ctypes.c_void_p(7), 2)
    assert len({thread for thread, _ in begun}) == 2 and {argument for _, argument in begun} == {7}
    meeting = threading.Barrier(1)
    together(function, ctypes.c_void_p(8), 1)
    assert begun[2:] == [(threading.get_ident(), 8)]
