"""`exact_window`: the window sees the keys themselves, what lies beyond it their codes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import NATIVE, attention_case, call, naive, run
from helpers import assert_same

from transformer_vq.ops.attention import blocks

SHAPES = [
    {},
    {"H": 4, "Hkv": 2, "rotary": True, "scale": 0.3},
    {"bias": (1, 23), "segments": True, "mask": "random"},
    {"window": 0, "rotary": True},
    {"cache": False},
]


def exact_case(T=23, **shape):
    """Keys that are no rows of the codebook."""
    case = attention_case(T=T, exact_window=True, **shape)
    keys = torch.randn(case.tensors["k_hat"].shape, dtype=torch.float64)
    return replace(case, tensors={**case.tensors, "k_hat": keys})


@pytest.mark.parametrize("grad_through_cache", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition_equals_loops(shape, grad_through_cache):
    case = exact_case(**shape, grad_through_cache=grad_through_cache)
    got = {name: x for name, x in run(case, "quadratic").items() if not name.startswith("state")}
    assert_same(got, naive(case), rtol=1e-12)


@pytest.mark.parametrize("backend", ["blockwise", NATIVE, "recurrent", "wide"])
@pytest.mark.parametrize("block_len", [1, 5, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backends_equal_the_definition_whatever_the_block(backend, block_len, shape, monkeypatch):
    monkeypatch.setitem(blocks.ROWS, "cpu", 20)  # many chunks
    case = exact_case(**shape)
    assert_same(run(case.with_options(block_len=block_len), backend), run(case, "quadratic"), rtol=1e-10)


@pytest.mark.parametrize("shape", [{"rotary": True}, {"bias": (1, 23)}], ids=str)
@pytest.mark.parametrize("backend", ["quadratic", "blockwise", NATIVE, "recurrent"])
def test_pieces_equal_the_whole(shape, backend):
    case, state, outputs, first = exact_case(**shape), None, [], 0
    for n in (9, 1, 2, 11):
        o, state = call(case.tokens(first, first + n), state, backend=backend)
        outputs.append(o)
        first += n
    assert_same({"o": torch.cat(outputs, 2)}, {"o": call(case)[0]}, rtol=1e-10)


def test_a_window_as_long_as_the_text_is_softmax_attention():
    case = exact_case(window=22)
    q, k, v = (case.tensors[name] for name in ("q", "k_hat", "v"))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    assert_same({"o": call(case, backend="blockwise")[0]}, {"o": want}, rtol=1e-12)


def test_the_rule_of_the_paper_is_refused():
    with pytest.raises(ValueError, match="exact_window needs gradients='window', not 'block'"):
        call(exact_case(gradients="block"))
