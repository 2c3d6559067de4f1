"""The fused backend: interpreted in a process of its own, refused elsewhere, natively where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_cases import attention_case, call, run

from transformer_vq.ops.attention import resolve_backend
from transformer_vq.ops.attention import triton as fused

HERE = Path(__file__).parent


def interpret(*arguments: str, timeout: int) -> None:
    """Run interpreted_triton.py with its kernels on the CPU."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            HERE / "interpreted_triton.py",
            *arguments,
        ],
        cwd=HERE.parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.timeout(900)
def test_kernels_equal_the_definition_under_the_interpreter():
    interpret(timeout=890)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_kernels_equal_the_definition_on_the_whole_grid():
    interpret("-m", "slow", timeout=4 * 3600 - 10)


def test_it_is_refused_on_the_cpu_in_one_line(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for refused in (lambda: resolve_backend("triton", "cpu", 9), lambda: call(attention_case(), backend="triton")):
        with pytest.raises(ValueError, match="needs a GPU, and tensors are on cpu; TRITON_INTERPRET=1") as error:
            refused()
        assert "\n" not in str(error.value)


def test_it_says_when_triton_is_not_installed(monkeypatch):
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton is not installed"):
        resolve_backend("triton", "cuda", 9)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [{}, {"bias": (1, 700)}, {"rotary": True}, {"segments": True}], ids=str)
def test_on_a_gpu_16_bit_errors_stay_small_and_two_runs_are_equal(shape):
    case = attention_case(T=700, window=100, K=64, V=64, S=64, scale=0.125, **shape)
    want = run(case, "quadratic")
    narrow = {n: x.bfloat16().cuda() if x.is_floating_point() else x.cuda() for n, x in case.tensors.items()}
    extra = {n: x if x is None else x.cuda() for n, x in case.extra.items()}
    case = replace(case, tensors=narrow, weights=case.weights.bfloat16().cuda(), extra=extra)
    one, other = run(case, "triton"), run(case, "triton")
    assert all(torch.equal(one[name], other[name]) for name in one)
    plain = run(case, "quadratic")
    for name in ("o", "dq", "dk_hat", "dv"):
        error, usual = ((x[name].double().cpu() - want[name]).abs().max() for x in (one, plain))
        assert error <= 2 * usual, name
