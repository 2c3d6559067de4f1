"""What the compiled backend has of its own: the library, panels, tiles, slots of codes, and a log to go back by.

That it equals the definition on every kind of call is in test_backends.py and its neighbours.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from attention_cases import RULES, attention_case, call, run
from helpers import assert_same

from transformer_vq.ops.attention import blockwise, dispatch, native
from transformer_vq.ops.kernels import compiler
from transformer_vq.ops.threads import together

pytestmark = pytest.mark.skipif(native.refusal("cpu") is not None, reason="no C++ compiler")


def test_both_sides_mean_the_same_work():
    assert compiler.library(native.SOURCE).size_of_work() == ctypes.sizeof(native.Work)
    assert compiler.library(native.SOURCE).size_of_job() == ctypes.sizeof(native.Job)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {"window": 70, "S": 100},  # windows longer than a block, more codes than a panel
        {"window": 5, "rotary": True, "Hkv": 1, "H": 3, "K": 20, "V": 20},
        {"window": 33, "segments": True, "bias": (1, 1), "S": 40},
    ],
    ids=str,
)
def test_many_blocks_and_tiles(shape, rule):
    case = attention_case(T=333, block_len=50, gradients=rule[0], grad_through_cache=rule[1], **shape)
    assert_same(run(case, "native"), run(case, "blockwise"), rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_of_many_codes_of_which_few_are_met(dtype):
    case = attention_case(T=150, window=8, S=1000, dtype=dtype)
    _, state = call(case.tokens(0, 70))
    rest = case.tokens(70, 150)
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    assert_same(run(rest, "native", state), run(rest, "quadratic", state), rtol=rtol)


def errors(case, backend):
    exact = {name: x.double() if x.is_floating_point() else x for name, x in case.tensors.items()}
    want = run(replace(case, tensors=exact, weights=case.weights.double()), "quadratic")
    got = run(case, backend)
    return {n: float((got[n].double() - want[n]).square().mean().sqrt()) for n in ("o", "dq", "dk_hat", "dv")}


@pytest.mark.parametrize("shape", [{}, {"rotary": True}], ids=str)
def test_fp32_is_as_exact_as_batched_products(shape):
    """Its exponential is a polynomial of its own."""
    case = attention_case(T=600, window=64, B=1, K=32, V=32, S=48, dtype=torch.float32, scale=0.3, **shape)
    ours, theirs = errors(case, "native"), errors(case, "blockwise")
    for name in ours:
        assert ours[name] <= 1.5 * theirs[name], f"{name}: {ours[name]:.1e}, blockwise {theirs[name]:.1e}"


def test_an_exponential_that_underflows_is_zero():
    case = attention_case(T=100, window=8, dtype=torch.float32, scale=200.0)
    got, want = run(case, "native"), run(case, "blockwise")
    assert all(x.isfinite().all() for x in got.values())
    assert_same({"o": got["o"]}, {"o": want["o"]}, rtol=1e-3)  # logits of 1,000 have 4 digits behind the point


def test_what_is_not_a_number_shows():
    """A loss that is not finite stops a run; a softmax that skips NaN would hide it."""
    case = attention_case(T=100, window=8, B=2, H=1, Hkv=1, dtype=torch.float32)
    case.tensors["q"][0, 0, 50, 0] = float("nan")
    got = run(case, "native")
    assert got["o"].isnan().any(-1).nonzero().tolist() == [[0, 0, 50]]
    assert got["dq"][1].isfinite().all() and not got["dq"][0, 0, 50].isfinite().any()


def test_nothing_that_memory_held_before_is_seen(monkeypatch):
    case = attention_case(T=140, window=9, rotary=True, segments=True, mask="random", H=4)
    want, empty = run(case, "native"), torch.Tensor.new_empty

    def poisoned(self, *args, **options):
        made = empty(self, *args, **options)
        return made.fill_(255) if made.dtype == torch.uint8 else made  # NaN, read as floating point

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    assert_same(run(case, "native"), want, rtol=0.0)


@pytest.fixture
def no_library_yet(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    compiler.attempt.cache_clear()
    yield tmp_path
    compiler.attempt.cache_clear()


def test_without_a_compiler_auto_says_why(no_library_yet, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(no_library_yet))
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler .*take blockwise"):
        call(attention_case(T=40), backend="native")
    name, why = dispatch.resolve_backend("auto", "cpu", 4096, 64, 64)
    assert name == "blockwise" and "needs a C++ compiler" in why and "\n" not in why


def test_a_compiler_that_fails_is_quoted_in_one_line(no_library_yet, monkeypatch):
    script = no_library_yet / "cxx"
    script.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such flag' >&2\nexit 1\n", "utf-8")
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(ValueError, match="backend native") as error:
        call(attention_case(T=40), backend="native")
    assert str(error.value).endswith("cxx fails on attention.cpp: x.cpp:1: error: no such flag; take blockwise")
    assert "\n" not in str(error.value)
    assert not list((no_library_yet / "kept").rglob("*.so"))


def test_a_compiler_that_is_not_there_is_named(no_library_yet, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.lack() == "CXX = no-such-compiler: there is no such command"


def test_a_home_that_cannot_be_written_is_done_without(no_library_yet):
    (no_library_yet / "kept").write_text("a file", "utf-8")
    assert native.refusal("cpu") is None


def test_what_could_not_be_had_is_not_tried_again(no_library_yet, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    first = native.refusal("cpu")
    monkeypatch.delenv("CXX")
    assert first is not None and native.refusal("cpu") == first


def test_a_bias_and_a_state_may_be_laid_out_in_any_way():
    case = attention_case(T=90, window=7, H=4, Hkv=2, bias=(1, 1))
    tensors = {**case.tensors, "bias": case.tensors["bias"].transpose(1, 3).contiguous().transpose(1, 3)}
    same = replace(case, tensors=tensors)
    assert not tensors["bias"].is_contiguous()
    _, state = call(case.tokens(0, 40))
    state = state._replace(count=state.count.mT.contiguous().mT)
    rest = same.tokens(40, 90)
    assert_same(run(rest, "native", state), run(rest, "quadratic", state), rtol=1e-10)
    even = replace(case, tensors={**case.tensors, "bias": torch.tensor(0.3, dtype=torch.float64).expand(1, 4, 1, 8)})
    assert_same(run(even, "native"), run(even, "quadratic"), rtol=1e-10)


def test_compiled_by_name():
    case = attention_case(T=70, backend="native")
    attend = torch.compile(lambda: call(case)[0], fullgraph=True, backend="eager")
    assert torch.equal(attend(), call(case)[0])


@pytest.mark.parametrize("B", [1, 3])
def test_an_uneven_division_is_shared_all_the_same(B, monkeypatch):
    monkeypatch.setattr(blockwise, "WORTH_A_THREAD", 0)
    monkeypatch.setattr(native, "outer_threads", lambda like: 2)
    case = attention_case(T=70, B=B, H=3, Hkv=1)
    seen = []

    def watched(function, job, n):
        seen.append((job._obj.count, n))
        together(function, job, n)

    monkeypatch.setattr(native, "together", watched)
    assert_same(run(case, "native"), run(case, "quadratic"), rtol=1e-10)
    assert set(seen) == {(3 * B, 2)}


def test_more_threads_come_than_are_needed(monkeypatch):
    monkeypatch.setattr(blockwise, "WORTH_A_THREAD", 0)
    monkeypatch.setattr(native, "outer_threads", lambda like: 2)
    case, before = attention_case(T=70, B=1, H=2, Hkv=2), torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        assert_same(run(case, "native"), run(case, "quadratic"), rtol=1e-10)
    finally:
        torch.set_num_threads(before)


def test_queries_that_overlap_in_memory():
    case = attention_case(T=8, B=1, H=1, Hkv=1, K=16)
    case.tensors["q"] = torch.randn(60, dtype=torch.float64).unfold(0, 16, 1)[:8][None, None]
    assert_same(run(case, "native"), run(case, "quadratic"), rtol=1e-10)


def test_two_may_compile_at_once(no_library_yet):
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(compiler.attempt.__wrapped__, [native.SOURCE] * 2))
    assert [one.size_of_work() for one in made] == [ctypes.sizeof(native.Work)] * 2
    assert [path.suffix for path in (no_library_yet / "kept" / "transformer_vq").iterdir()] == [".so"]


def test_a_gpus_tensors_are_refused():
    assert "is for processors" in str(native.refusal("cuda"))
