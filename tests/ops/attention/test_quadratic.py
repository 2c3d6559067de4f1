"""The definition, compared with loops over single queries and keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import attention_case, call, naive, run
from helpers import assert_same

RULES = [("window", True), ("window", False), ("block", True), ("block", False)]


def without_state(result: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x for name, x in result.items() if not name.startswith("state")}


@pytest.mark.parametrize(("gradients", "grad_through_cache"), RULES)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"T": 1},
        {"T": 3, "block_len": 5, "window": 0},
        {"window": 20, "bias": (1, 13)},
        {"H": 4, "Hkv": 2, "bias": (2, 1)},
        {"H": 2, "Hkv": 1, "rotary": True, "scale": 0.3},
        {"segments": True, "window": 2, "bias": (2, 13)},
        {"mask": "middle", "segments": True, "rotary": True, "bias": (1, 13)},
        {"mask": "left", "block_len": 3},
        {"mask": "random", "cache": False, "bias": (1, 1)},
        {"cache": False, "segments": True},
        {"S": 1, "rotary": True},
    ],
    ids=str,
)
def test_definition_equals_loops(shape, gradients, grad_through_cache):
    case = attention_case(**shape, gradients=gradients, grad_through_cache=grad_through_cache)
    assert_same(without_state(run(case, "quadratic")), naive(case), rtol=1e-12)


@pytest.mark.parametrize(("gradients", "grad_through_cache"), RULES)
@pytest.mark.parametrize("shape", [{"rotary": True}, {"bias": (1, 17)}, {"segments": True, "mask": "random"}], ids=str)
def test_pieces_equal_the_whole_and_cached_logits_use_the_current_codebook(shape, gradients, grad_through_cache):
    pieces = [5, 1, 2, 9]
    case = attention_case(T=17, window=3, gradients=gradients, grad_through_cache=grad_through_cache, **shape)
    codebooks = [case.tensors["codebook"] + 0.1 * n for n in range(len(pieces))]
    state, first, got, k_hat = None, 0, [], case.tensors["k_hat"].clone()
    for n, codebook in zip(pieces, codebooks, strict=True):
        piece = case.tokens(first, first + n)
        piece.tensors["codebook"] = codebook
        piece.tensors["k_hat"] = torch.take_along_dim(codebook[None], piece.tensors["codes"][..., None], dim=2)
        k_hat[:, :, first : first + n] = piece.tensors["k_hat"]
        got.append(run(piece, "quadratic", state))
        state = call(piece, state)[1]
        first += n
    want = naive(replace(case, tensors={**case.tensors, "k_hat": k_hat}), pieces, codebooks)
    assert_same({name: torch.cat([g[name] for g in got], dim=2) for name in want}, want, rtol=1e-12)


def test_state_is_what_it_says():
    case = attention_case(T=11, window=3, B=1, H=1, Hkv=1)
    _, state = call(case)
    x = case.tensors
    old_codes, old_v = x["codes"][0, 0, :8], x["v"][0, 0, :8]
    for s in range(x["codebook"].shape[1]):
        mine = old_v[old_codes == s]
        assert state.count[0, 0, s] == len(mine)
        torch.testing.assert_close(state.mean[0, 0, s], mine.sum(0) / max(len(mine), 1))
    assert torch.equal(state.codes[0, 0], x["codes"][0, 0, 8:])
    assert torch.equal(state.k_hat[0, 0], x["k_hat"][0, 0, 8:])
    assert torch.equal(state.v[0, 0], x["v"][0, 0, 8:])
    assert state.alive.all() and state.position.tolist() == [11]


def test_state_forgets_an_earlier_document():
    case = attention_case(T=9, window=4, B=1).with_extra(segments=torch.tensor([[7] * 6 + [8] * 3]))
    _, state = call(case)
    assert state.segment.tolist() == [8] and state.position.tolist() == [9]
    assert state.alive.tolist() == [[False, True, True, True]]
    assert state.count.sum() == 0 and state.mean.abs().sum() == 0
    assert state.k_hat[:, :, 0].abs().sum() == 0 and state.v[:, :, 0].abs().sum() == 0


def test_call_that_starts_with_another_document_starts_empty():
    case = attention_case(T=6, B=1)
    _, state = call(attention_case(T=9, B=1, seed=1).with_extra(segments=torch.full((1, 9), 3)))
    other = case.with_extra(segments=torch.full((1, 6), 4))
    (o, after), (o_empty, after_empty) = call(other, state), call(other)
    assert torch.equal(o, o_empty)
    assert all(torch.equal(a, b) for a, b in zip(after[:-1], after_empty[:-1], strict=True))
    assert state.count.sum() > 0 and after.position.tolist() == [15]
    o, _ = call(case.with_extra(segments=torch.full((1, 6), 3)), state)
    assert not torch.allclose(o, call(other)[0])
    assert torch.equal(o, call(case, state)[0])  # without ids a call continues the document


def test_document_that_comes_back_is_a_new_one():
    case = attention_case(T=9, B=1)
    back = case.with_extra(segments=torch.tensor([[1, 1, 1, 2, 2, 2, 1, 1, 1]]))
    new = case.with_extra(segments=torch.tensor([[1, 1, 1, 2, 2, 2, 3, 3, 3]]))
    assert torch.equal(call(back)[0], call(new)[0])


def test_padded_row_leaves_its_state_alone():
    case = attention_case(T=6, B=2, mask="all", segments=True)
    _, before = call(attention_case(T=9, B=2, seed=1))
    o, after = call(case, before)
    assert o[0].abs().max() == 0
    for name, x in after._asdict().items():
        torch.testing.assert_close(x[0], getattr(before, name)[0])
    assert after.position.tolist() == [9, 15]


def test_nan_in_padding_is_invisible():
    case = attention_case(mask="random", bias=(2, 13), segments=True)
    dirty = {k: x.clone() for k, x in case.tensors.items()}
    for name in ("q", "k_hat", "v"):
        dirty[name].masked_fill_(~case.extra["mask"][:, None, :, None], float("nan"))
    assert_same(run(replace(case, tensors=dirty), "quadratic"), run(case, "quadratic"), rtol=0)


def test_counts_are_wide_when_inputs_are_not():
    case = attention_case(T=600, B=1, H=1, Hkv=1, S=1, dtype=torch.bfloat16)
    o, state = call(case)
    assert o.dtype == state.v.dtype == state.k_hat.dtype == torch.bfloat16
    assert state.count.dtype == state.mean.dtype == torch.float32
    assert state.count.item() == 596  # bf16 stops counting at 256
    assert call(attention_case())[1].count.dtype == torch.float64


def test_autocast_changes_nothing():
    case = attention_case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, _ = call(case)
    assert torch.equal(o, call(case)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 13, 4)}, r"3 query heads in q \(2, 3, 13, 4\)"),
        ({"k_hat": torch.zeros(2, 2, 12, 4)}, r"k_hat has shape \(2, 2, 12, 4\)"),
        ({"codes": torch.zeros(2, 1, 13, dtype=torch.int64)}, r"codes has shape \(2, 1, 13\)"),
        ({"codes": torch.zeros(2, 2, 13)}, "int64"),
        ({"codebook": torch.zeros(2, 5, 6)}, r"codebook has shape \(2, 5, 6\)"),
        ({"codebook": torch.zeros(5, 6)}, "3 axes"),
        ({"bias": torch.zeros(1, 2, 1, 4)}, r"bias has shape \(1, 2, 1, 4\); it needs .*1, 5\)"),
        ({"rotary": torch.zeros(3)}, r"rotary has shape \(3,\)"),
        ({"mask": torch.ones(2, 12, dtype=torch.bool)}, r"mask has shape \(2, 12\)"),
        ({"mask": torch.ones(2, 13)}, "bool"),
        ({"segments": torch.ones(13, dtype=torch.int64)}, "segments has shape"),
        ({"window": -1}, "window"),
        ({"block_len": 0}, "block_len"),
        ({"gradients": "paper"}, "window, block"),
        ({"backend": "blokwise"}, "did you mean 'blockwise'"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_arguments_are_told_with_their_shapes(change, message):
    case = attention_case()
    from transformer_vq.ops import vq_attention

    with pytest.raises(ValueError, match=message):
        vq_attention(**{**case.tensors, **case.options, **change})


def test_state_of_another_size_is_refused():
    _, state = call(attention_case(window=3))
    with pytest.raises(ValueError, match=r"state.codes has shape \(2, 2, 3\); this call needs \(2, 2, 4\)"):
        call(attention_case(window=4), state)


def test_empty_call():
    _, state = call(attention_case(T=9))
    o, after = call(attention_case(T=0), state)
    assert o.shape == (2, 2, 0, 3)
    assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))
