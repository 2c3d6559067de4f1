"""One token after another in two kernels against the definition, interpreted; test_ring.py starts the process."""

from __future__ import annotations

import pytest
import torch
from attention_cases import attention_case, call
from helpers import assert_same

from transformer_vq.ops.attention import initial_state, ring
from transformer_vq.ops.attention.ring import close_ring, open_ring, step

SHAPES = [
    {},
    {"H": 4, "Hkv": 2, "bias": (2, 10), "rotary": True},
    {"H": 2, "Hkv": 1, "bias": (1, 1), "S": 40, "K": 24, "V": 17},
    {"cache": False, "rotary": True},
]


@pytest.fixture(autouse=True)
def several_programs_and_nan_in_new_memory(monkeypatch):
    monkeypatch.setattr(ring, "COLUMNS", 16)
    monkeypatch.setattr(ring, "PROGRAMS", 8)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def token(case, t):
    """q, k_hat, codes, v and bias of token t, as `step` takes them."""
    x = case.tokens(t, t + 1).tensors
    Hkv = x["v"].shape[1]
    q = x["q"].unflatten(1, (Hkv, -1)).flatten(0, 1)[:, :, 0]
    bias = x["bias"].unflatten(1, (Hkv, -1))[:, :, :, 0].flip(-1) if "bias" in x else None
    return q, *(x[name].flatten(0, 1)[:, 0] for name in ("k_hat", "codes", "v")), bias


def numbers(state):
    return {name: x.double() for name, x in state._asdict().items()}


QUICK = [(0, SHAPES[0]), (3, SHAPES[1]), (20, SHAPES[2]), (1, SHAPES[3])]
REST = [(window, shape) for window in (0, 3, 20) for shape in SHAPES if (window, shape) not in QUICK]


@pytest.mark.parametrize(("window", "shape"), QUICK + [pytest.param(*x, marks=pytest.mark.slow) for x in REST], ids=str)
def test_equals_the_definition_token_by_token(shape, window):
    """From a state that some tokens left; with fewer tokens than the window too."""
    case = attention_case(T=10, window=window, scale=0.4, **shape)
    _, state = call(case.tokens(0, 5), backend="quadratic")
    kept = {name: x.clone() for name, x in numbers(state).items()}
    options = {"rotary": case.extra.get("rotary"), "scale": 0.4, "cache": shape.get("cache", True)}
    now = open_ring(state, case.tensors["codebook"], **options)
    before = state
    for t in range(5, 10):
        want, before = call(case.tokens(t, t + 1), before, backend="quadratic")
        o, now = step(now, *token(case, t))
        assert_same({"o": o.reshape(want.shape)}, {"o": want}, 1e-10)
    assert_same(numbers(close_ring(now)), numbers(before), 1e-10)
    assert_same(numbers(state), kept, 0)


def test_before_the_first_token_and_in_16_bits():
    """Counts and means stay fp32."""
    case = attention_case(T=9, window=2, dtype=torch.float16)
    before = initial_state(2, 2, 4, 3, 5, 2, torch.float16, "cpu")
    now = open_ring(before, case.tensors["codebook"])
    for t in range(9):
        want, before = call(case.tokens(t, t + 1), before, backend="quadratic")
        o, now = step(now, *token(case, t))
        assert_same({"o": o.reshape(want.shape).double()}, {"o": want.double()}, 1e-2)
    assert now.mean.dtype == now.count.dtype == torch.float32
    assert_same(numbers(close_ring(now)), numbers(before), 1e-6)


def test_a_ring_that_has_moved_on_is_refused_in_one_line():
    case = attention_case(T=3)
    first = open_ring(initial_state(2, 2, 4, 3, 5, 4, torch.float64, "cpu"), case.tensors["codebook"])
    step(first, *token(case, 0))
    for again in (lambda: step(first, *token(case, 1)), lambda: close_ring(first)):
        with pytest.raises(ValueError, match="has gone on by 1 tokens") as error:
            again()
        assert "\n" not in str(error.value)


def test_two_runs_are_equal_bit_for_bit():
    case = attention_case(T=4, S=40, window=3, dtype=torch.float32)
    found = []
    for _ in range(2):
        now = open_ring(initial_state(2, 2, 4, 3, 40, 3, torch.float32, "cpu"), case.tensors["codebook"])
        for t in range(4):
            o, now = step(now, *token(case, t))
        found.append((o, *close_ring(now)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
