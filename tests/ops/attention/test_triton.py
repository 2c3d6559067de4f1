"""The fused backend: interpreted in a process of its own, refused elsewhere. Natively: test_on_gpu.py."""

from __future__ import annotations

import pytest
from attention_cases import attention_case, call
from interpret import interpret

from transformer_vq.ops.attention import resolve_backend
from transformer_vq.ops.attention import triton as fused

FILE = "ops/attention/interpreted_triton.py"


@pytest.mark.timeout(900)
def test_kernels_equal_the_definition_under_the_interpreter():
    interpret(FILE, timeout=890)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_kernels_equal_the_definition_for_every_pair_of_settings():
    interpret(FILE, "-m", "slow", timeout=4 * 3600 - 10)


def test_it_is_refused_on_the_cpu_in_one_line(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for refused in (
        lambda: resolve_backend("triton", "cpu", 9, 4, 3),
        lambda: call(attention_case(), backend="triton"),
    ):
        with pytest.raises(ValueError, match="needs a GPU, and tensors are on cpu; TRITON_INTERPRET=1") as error:
            refused()
        assert "\n" not in str(error.value)


def test_it_says_when_triton_is_not_installed(monkeypatch):
    monkeypatch.setattr(fused, "installed", lambda: False)
    with pytest.raises(ValueError, match=r"backend triton: needs triton: pip install 'transformer-vq\[gpu\]'"):
        resolve_backend("triton", "cuda", 9, 4, 3)
