"""A sequence cut into pieces, each with the state that those before it leave: the uncut call, gradients included."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import LEARN, NATIVE, Case, attention_case, call, naive, run
from torch import Tensor

from transformer_vq.ops.attention import AttentionState, initial_state
from transformer_vq.ops.attention.arguments import Arguments
from transformer_vq.ops.attention.call import prepare
from transformer_vq.ops.attention.choice import Look, choose
from transformer_vq.ops.attention.op import attend_backward_op, attend_op, flat
from transformer_vq.ops.attention.split import follow, summary


def in_pieces(case: Case, lengths: list[int], backend: str, state: AttentionState | None = None) -> dict[str, Tensor]:
    """What `run` gives for the whole, from pieces that are summed up apart."""
    learn = {name: x.clone().requires_grad_() for name, x in case.tensors.items() if name in LEARN}
    whole = replace(case, tensors={**case.tensors, **learn})
    B, Hkv, _, V = learn["v"].shape
    sizes = (B, Hkv, learn["q"].shape[3], V, case.tensors["codebook"].shape[1], case.options["window"])
    before = initial_state(*sizes, learn["v"].dtype, "cpu") if state is None else state
    o, first = [], 0
    for n in lengths:
        piece = whole.tokens(first, first + n)
        more: dict[str, Any] = {"state": state} if first == 0 else {"state": before, "linked": True}
        out, _ = call(piece, **more, backend=backend)
        o.append(out)
        before = follow(before, summary(Arguments(**piece.tensors, **piece.options, **piece.extra)))
        first += n
    joined = torch.cat(o, 2)
    grads = torch.autograd.grad((joined * case.weights).sum(), list(learn.values()))
    return (
        {"o": joined.detach()}
        | {f"d{name}": g for name, g in zip(learn, grads, strict=True)}
        | {f"state.{name}": x.detach().to(torch.float64) for name, x in before._asdict().items()}
    )


def assert_equal(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scalar": {"bias": (1, 1), "scale": 0.7},
    "xl": {"bias": (2, 24), "H": 4},
    "rotary": {"rotary": True},
    "rotary, paper's rule": {"rotary": True, "gradients": "block"},
    "exact window": {"exact_window": True},
    "no cache": {"cache": False, "bias": (1, 1)},
    "no gradient through the cache": {"grad_through_cache": False},
    "paper's rule": {"gradients": "block", "bias": (1, 1)},
    "paper's rule, gradient ends with the block": {"gradients": "block", "grad_through_cache": False},
    "documents": {"segments": True, "bias": (2, 24)},
    "documents, paper's rule": {"segments": True, "gradients": "block"},
    "padding": {"mask": "random", "bias": (1, 24)},
    "padding in front, documents": {"mask": "left", "segments": True, "rotary": True},
    "a row of padding": {"mask": "all", "segments": True},
    "padding behind, paper's rule": {"mask": "right", "gradients": "block"},
    "no window": {"window": 0},
}


def check(name: str, backend: str) -> None:
    case = attention_case(**{"T": 24, "window": 5, **SETTINGS[name]})
    assert_equal(in_pieces(case, [8, 8, 8], backend), run(case, "quadratic"))


@pytest.mark.parametrize("backend", ["blockwise", NATIVE])
@pytest.mark.parametrize("name", SETTINGS)
def test_pieces_are_the_uncut_call(name: str, backend: str) -> None:
    check(name, backend)


@pytest.mark.parametrize("backend", ["quadratic", "recurrent", "wide"])
@pytest.mark.parametrize("name", ["rotary, paper's rule", "no gradient through the cache", "documents"])
def test_every_backend_gives_the_state_its_gradient(name: str, backend: str) -> None:
    check(name, backend)


@pytest.mark.parametrize("name", ["plain", "rotary, paper's rule"])
def test_flash_gives_the_state_its_gradient(name: str) -> None:
    check(name, "flash")


def test_pieces_equal_the_words_of_the_definition() -> None:
    case = attention_case(T=16, window=3, bias=(1, 1), segments=True, gradients="block")
    assert_equal(in_pieces(case, [4, 8, 4], "blockwise"), naive(case))


@pytest.mark.parametrize("lengths", [[1] * 16, [4, 4, 4, 4], [12, 4], [2, 6, 8]])
@pytest.mark.parametrize("segments", [False, True])
def test_pieces_may_be_shorter_than_the_window(lengths: list[int], segments: bool) -> None:
    case = attention_case(T=16, window=7, segments=segments, mask="random", rotary=True)
    assert_equal(in_pieces(case, lengths, "blockwise"), run(case, "quadratic"))


@pytest.mark.parametrize("backend", ["blockwise", NATIVE])
@pytest.mark.parametrize("extra", [{}, {"segments": True}, {"rotary": True, "gradients": "block"}])
def test_the_first_piece_goes_on_from_an_older_codebook(extra: dict[str, Any], backend: str) -> None:
    case = attention_case(T=28, window=5, **extra)
    _, state = call(case.tokens(0, 12))
    now = case.tokens(12, 28)
    now = replace(now, tensors={**now.tensors, "codebook": now.tensors["codebook"] + 0.1})
    k_hat = torch.take_along_dim(now.tensors["codebook"][None], now.tensors["codes"][..., None], dim=2)
    now = replace(now, tensors={**now.tensors, "k_hat": k_hat})
    assert_equal(in_pieces(now, [8, 8], backend, state), run(now, "quadratic", state))


def test_many_chunks_and_threads_share_the_gradient_of_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_vq.ops.attention import blocks, blockwise

    monkeypatch.setitem(blocks.ROWS, "cpu", 16)
    monkeypatch.setattr(blockwise, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(blockwise, "outer_threads", lambda like: 2)
    case = attention_case(T=48, window=5, B=1, H=4, Hkv=1, bias=(1, 1))
    assert_equal(in_pieces(case, [16, 16, 16], "blockwise"), run(case, "quadratic"))


def test_a_linked_call_needs_its_state_and_a_backend_that_gives_it_gradient() -> None:
    case = attention_case(T=40)
    with pytest.raises(ValueError, match="linked needs the state"):
        call(case, linked=True)
    assert choose(Look("cuda", 4096, 64, 64, torch.bfloat16, 90, triton=True, linked=True))[0] == "wide"


@pytest.mark.slow
def test_opcheck_of_a_linked_call() -> None:
    case = attention_case(T=20, bias=(1, 1), backend="blockwise")
    _, state = call(case)
    x = prepare(Arguments(**case.tensors, **case.options, state=state, linked=True)).with_leaves()
    values = flat(x)
    torch.library.opcheck(attend_op._opoverload, (*values, True))
    o, *notes = attend_op(*values, True)
    fixed = [y.detach() if isinstance(y, Tensor) else y for y in values]
    given = (*fixed, o.detach(), notes, torch.randn_like(o))
    torch.library.opcheck(attend_backward_op._opoverload, given, test_utils=("test_schema", "test_faketensor"))
