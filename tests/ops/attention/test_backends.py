"""Every backend equals the definition: output, state and all gradients, in fp64."""

from __future__ import annotations

import pytest
from attention_cases import attention_case, run
from helpers import assert_same
from transformer_vq.ops.attention import blocks

LINEAR = ["blockwise", "recurrent"]
RULES = [("window", True), ("window", False), ("block", True), ("block", False)]


@pytest.fixture(params=[20, 4096], ids=["small chunks", "one chunk"])
def chunk_rows(request, monkeypatch):
    monkeypatch.setitem(blocks.ROWS, "cpu", request.param)


@pytest.mark.usefixtures("chunk_rows")
@pytest.mark.parametrize("backend", LINEAR)
@pytest.mark.parametrize(("gradients", "grad_through_cache"), RULES)
@pytest.mark.parametrize(
    ("T", "block_len", "window"),
    [(1, 4, 4), (3, 8, 4), (32, 8, 8), (67, 16, 24), (37, 8, 0), (29, 16, 5), (21, 4, 40), (16, 1, 3), (5, 1, 0)],
)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"Hkv": 1, "H": 4, "bias": "rows"},
        {"Hkv": 2, "H": 4, "rotary": True, "scale": 0.4},
        {"bias": "constant", "cache": False, "segments": True},
        {"segments": True, "mask": "random", "rotary": True, "bias": "rows"},
    ],
    ids=str,
)
def test_equals_the_definition(backend, T, block_len, window, shape, gradients, grad_through_cache):
    shape = dict(shape)
    bias = {"rows": (2, T), "constant": (1, 1), None: None}[shape.pop("bias", None)]
    rule = {"gradients": gradients, "grad_through_cache": grad_through_cache}
    case = attention_case(T=T, block_len=block_len, window=window, bias=bias, **shape, **rule)
    assert_same(run(case, backend), run(case, "quadratic"), rtol=1e-10)
