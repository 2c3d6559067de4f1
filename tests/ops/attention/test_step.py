"""Decoding on a memory: token by token what the recurrent backend computes, and no memory is ever changed."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, attention_case, call
from helpers import assert_same
from torch import Tensor

from transformer_vq.ops.attention import AttentionState, step
from transformer_vq.ops.attention.step import Memory, close_memory, open_memory, start_memory, tables

SHAPES = [
    {},
    {"Hkv": 1, "H": 3, "bias": (2, 30)},
    {"Hkv": 2, "H": 4, "rotary": True},
    {"Hkv": 1, "H": 1, "rotary": True, "bias": (1, 1), "cache": False},
    {"cache": False, "B": 1},
    {"exact_window": True, "Hkv": 1, "H": 2, "rotary": True},
    {"exact_window": True, "bias": (1, 1)},
]


def tables_of(case: Case):
    x = case.tensors["codebook"]
    options = case.options
    cache, exact = options.get("cache", True), options.get("exact_window", False)
    return tables(x, options["window"], cache, case.extra.get("rotary"), exact)


def groups(case: Case) -> int:
    return case.tensors["q"].shape[1] // case.tensors["v"].shape[1]


def one(case: Case, t: int, memory: Memory) -> tuple[Tensor, Memory]:
    """Token t through a memory: o (B, H, 1, V)."""
    x = case.tokens(t, t + 1).tensors
    B, H, Hkv = len(x["q"]), x["q"].shape[1], x["v"].shape[1]
    bias = x["bias"].flip(-1).view(-1, H // Hkv, x["bias"].shape[-1]) if "bias" in x else None
    q, codes, v = x["q"].view(B * Hkv, H // Hkv, -1), x["codes"].view(B * Hkv, 1), x["v"].view(B * Hkv, -1)
    o, memory = step.step(memory, q, x["k_hat"].reshape(B * Hkv, -1), codes, v, bias)
    return o.reshape(B, H, 1, -1), memory


def numbers(state: AttentionState) -> dict[str, Tensor]:
    return {name: x.double() for name, x in state._asdict().items()}


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("window", "room"), [(4, 64), (4, 5), (0, 3), (9, 1)])
def test_equals_the_recurrent_backend_and_its_state(shape, window, room, monkeypatch):
    monkeypatch.setattr(step, "ROOM", room)
    case = attention_case(T=30, window=window, **shape)
    if shape.get("exact_window"):
        case.tensors["k_hat"].add_(torch.randn_like(case.tensors["k_hat"]))
    B, V = case.weights.shape[0], case.tensors["v"].shape[-1]
    memory, state = start_memory(B, V, tables_of(case), groups(case), torch.float64), None
    for t in range(30):
        want, state = call(case.tokens(t, t + 1), state, backend="recurrent")
        got, memory = one(case, t, memory)
        assert_same({"o": got, **numbers(close_memory(memory))}, {"o": want, **numbers(state)}, rtol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("mask", ["left", "random", "all"])
@pytest.mark.parametrize("rotary", [False, True])
def test_goes_on_from_a_padded_state_of_another_codebook(mask, rotary):
    case, read = attention_case(T=20, window=6, rotary=rotary), attention_case(T=11, window=6, mask=mask, segments=True)
    state = call(read)[1]
    memory = open_memory(state, tables_of(case), groups(case), torch.float64)
    for t in range(20):
        want, state = call(case.tokens(t, t + 1), state, backend="recurrent")
        got, memory = one(case, t, memory)
        assert_same({"o": got, **numbers(close_memory(memory))}, {"o": want, **numbers(state)}, rtol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_memory_is_changed_by_a_step_from_it(mode, monkeypatch):
    monkeypatch.setattr(step, "ROOM", 3)
    case = attention_case(T=12, window=2, rotary=True)
    with mode():
        memory = start_memory(2, 3, tables_of(case), groups(case), torch.float64)
        kept = []
        for t in range(12):
            kept.append((memory, one(case, t, memory)[0], numbers(close_memory(memory))))
            memory = one(case, t, memory)[1]  # the second step from the same memory
    for t, (memory, o, before) in enumerate(kept):  # also outside of the mode that made the buffers
        with torch.no_grad():
            other = one(case, (t + 5) % 12, memory)[0]
            assert_same({"o": one(case, t, memory)[0], **numbers(close_memory(memory))}, {"o": o, **before}, rtol=0.0)
            assert not torch.equal(other, o)


def test_a_state_of_other_sizes_is_refused():
    case, other = attention_case(T=3), attention_case(T=3, S=7)
    with pytest.raises(ValueError, match=r"state\.count has shape"):
        open_memory(call(other)[1], tables_of(case), groups(case), torch.float64)
