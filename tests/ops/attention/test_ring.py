"""Decoding in two kernels: interpreted in a process of its own, compiled for GPUs that are not here."""

from __future__ import annotations

import os

import pytest
import torch
from interpret import interpret

pytest.importorskip("triton")
FILE = "ops/attention/interpreted_ring.py"


@pytest.mark.timeout(900)
def test_kernels_equal_the_definition_under_the_interpreter():
    interpret(FILE, timeout=890)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kernels_equal_the_definition_in_all_cases():
    interpret(FILE, "-m", "slow", timeout=3590)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("arch", "K", "V", "dtype"),
    [
        (90, 128, 128, torch.bfloat16),
        *(
            pytest.param(arch, K, V, dtype, marks=pytest.mark.slow)
            for arch in (80, 90, 100)
            for K, V in ((64, 64), (128, 256), (256, 256))
            for dtype in (torch.bfloat16, torch.float32)
        ),
    ],
    ids=str,
)
def test_a_step_fits_the_device(arch, K, V, dtype):
    from ops.attention.compiled import as_row, launches, show

    from transformer_vq.ops.attention import initial_state
    from transformer_vq.ops.attention.ring import open_ring, step

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    state = initial_state(2, 4, K, V, 512, 512, dtype, "meta")
    ring = open_ring(state, empty(4, 512, K), rotary=torch.empty(K // 2, device="meta"))
    codes = torch.empty(8, dtype=torch.int64, device="meta")
    with launches(arch) as made:
        step(ring, empty(8, 2, K), empty(8, K), codes, empty(8, V), empty(2, 4, 2, 513))
    rows = [as_row(*launch) for launch in made]
    assert [x.kernel for x in rows] == ["read_kernel", "write_kernel"]
    for x in rows:
        print(show(x, arch))
        wrong = [w for w in x.faults(arch) if w != "no matrix instruction" or dtype == torch.bfloat16]
        assert not wrong, show(x, arch)
