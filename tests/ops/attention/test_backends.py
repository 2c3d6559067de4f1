"""Every backend equals the definition: output, state and all gradients, in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import NATIVE, attention_case, call, every_triple, run
from helpers import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_vq.ops.attention import blocks, initial_state

LINEAR = ["blockwise", NATIVE, "recurrent", "wide"]
SIZES = [
    (1, 4, 4),
    (3, 8, 4),
    (32, 8, 8),
    (67, 16, 24),
    (37, 8, 0),
    (29, 16, 5),
    (21, 4, 40),
    (16, 1, 3),
    (5, 1, 0),
    (19, 32, 5),
]
SHAPES = [
    {},
    {"Hkv": 1, "H": 4, "bias": "rows"},
    {"Hkv": 2, "H": 4, "rotary": True, "scale": 0.4},
    {"bias": "constant", "cache": False, "segments": True},
    {"segments": True, "mask": "random", "rotary": True, "bias": "rows"},
]
CARRIED = [{}, {"rotary": True, "H": 4}, {"bias": (1, 23)}, {"segments": True, "mask": "random"}, {"cache": False}]


@pytest.mark.parametrize(
    ("backend", "chunk_rows"),
    [
        ("blockwise", 20),
        ("blockwise", 4096),
        pytest.param("native", None, marks=NATIVE.marks),
        pytest.param("wide", 20, marks=pytest.mark.slow),
        ("recurrent", None),
    ],
    ids=["blockwise, many chunks", "blockwise, one chunk", "native", "wide", "recurrent"],
)
@pytest.mark.parametrize(("shape", "sizes", "rule"), every_triple(SHAPES, SIZES), ids=str)
def test_equals_the_definition(backend, chunk_rows, shape, sizes, rule, monkeypatch):
    if chunk_rows is not None:
        monkeypatch.setitem(blocks.ROWS, "cpu", chunk_rows)
    (T, block_len, window), shape = sizes, dict(shape)
    bias = {"rows": (2, T), "constant": (1, 1), None: None}[shape.pop("bias", None)]
    rule = {"gradients": rule[0], "grad_through_cache": rule[1]}
    case = attention_case(T=T, block_len=block_len, window=window, bias=bias, **shape, **rule)
    assert_same(run(case, backend), run(case, "quadratic"), rtol=1e-10)


@pytest.mark.parametrize("backend", LINEAR)
@pytest.mark.parametrize(("shape", "window", "rule"), every_triple(CARRIED, [0, 3, 9, 20]), ids=str)
def test_state_carries_over_under_a_moving_codebook(backend, shape, window, rule):
    rule = {"gradients": rule[0], "grad_through_cache": rule[1]}
    case = attention_case(T=23, window=window, block_len=4, **shape, **rule)
    state, first = None, 0
    for n in (9, 1, 2, 11):
        piece = case.tokens(first, first + n)
        codebook = case.tensors["codebook"] * (1 + 0.1 * first)
        k_hat = torch.take_along_dim(codebook[None], piece.tensors["codes"][..., None], dim=2)
        piece = replace(piece, tensors={**piece.tensors, "codebook": codebook, "k_hat": k_hat})
        assert_same(run(piece, backend, state), run(piece, "quadratic", state), rtol=1e-10)
        _, state = call(piece, state, backend=backend)
        first += n


def test_a_state_laid_out_otherwise_is_the_same_state():
    case = attention_case(T=23, window=3, H=3, Hkv=3)
    _, state = call(case.tokens(0, 9))
    turned = state._replace(
        count=state.count.transpose(0, 1).contiguous().transpose(0, 1),
        mean=state.mean.transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert not turned.count.is_contiguous() and not turned.mean.is_contiguous()
    rest = case.tokens(9, 23)
    assert_same(run(rest, "blockwise", turned), run(rest, "blockwise", state), rtol=1e-12)


@pytest.mark.parametrize("backend", ["quadratic", *LINEAR])
@pytest.mark.parametrize("mask", ["left", "right", "middle", "random", "all"])
def test_padding_is_invisible(backend, mask):
    case = attention_case(T=17, window=3, mask=mask, segments=True, bias=(3, 17), B=3)
    got = run(case, backend)
    for b in range(3):
        keep = case.extra["mask"][b]
        for name in ("o", "dq", "dk_hat", "dv", "dbias"):
            assert got[name][b][:, ~keep].abs().sum() == 0
        if not keep.any():
            continue
        alone = {n: x if n == "codebook" else x[b : b + 1, :, keep] for n, x in case.tensors.items()}
        extra = {"segments": case.extra["segments"][b : b + 1, keep]}
        single = replace(case, tensors=alone, weights=case.weights[b : b + 1, :, keep], extra=extra)
        want = run(single, "quadratic")
        row = {n: got[n][b : b + 1] if n.startswith("state") else got[n][b : b + 1, :, keep] for n in want}
        assert_same(row, want, rtol=1e-10)


@pytest.mark.parametrize("backend", LINEAR)
@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_any_shape_equals_the_definition(backend, data):
    draw = data.draw
    T, Hkv = draw(st.integers(1, 40)), draw(st.integers(1, 2))
    case = attention_case(
        T=T,
        window=draw(st.integers(0, 45)),
        block_len=draw(st.integers(1, 45)),
        B=draw(st.integers(1, 3)),
        Hkv=Hkv,
        H=Hkv * draw(st.integers(1, 3)),
        K=2 * draw(st.integers(1, 3)),
        V=draw(st.integers(1, 4)),
        S=draw(st.integers(2, 6)),
        bias=draw(st.sampled_from([None, (1, 1), (1, T)])),
        rotary=draw(st.booleans()),
        segments=draw(st.booleans()),
        mask=draw(st.sampled_from([None, "left", "right", "middle", "random"])),
        seed=draw(st.integers(0, 3)),
        cache=draw(st.booleans()),
        gradients=draw(st.sampled_from(["window", "block"])),
        grad_through_cache=draw(st.booleans()),
    )
    got, want = run(case, backend), run(case, "quadratic")
    for name in got:  # against the largest of all gradients: where all keys but one are hidden, one of them is 0
        if want[name].numel() == 0:
            continue
        error, largest = (got[name] - want[name]).abs().max(), max(x.abs().max() for x in want.values() if x.numel())
        assert error <= 1e-10 * largest, name  # all of it is 0 where no token is real


@pytest.mark.parametrize("backend", ["quadratic", *LINEAR])
@pytest.mark.parametrize("grad_through_cache", [True, False])
def test_nothing_depends_on_the_block_length(backend, grad_through_cache):
    case = attention_case(T=45, window=7, rotary=True, bias=(1, 45), grad_through_cache=grad_through_cache)
    want = run(case, backend)
    for block_len in (1, 5, 16, 100):
        assert_same(run(case.with_options(block_len=block_len), backend), want, rtol=1e-10)


def test_gradients_of_the_paper_do_depend_on_the_block_length():
    case = attention_case(T=45, window=7, gradients="block")
    short, long = run(case.with_options(block_len=4), "blockwise"), run(case.with_options(block_len=16), "blockwise")
    assert_same({"o": short["o"]}, {"o": long["o"]}, rtol=1e-10)
    assert (short["dk_hat"] - long["dk_hat"]).abs().max() > 0.03 * long["dk_hat"].abs().max()


@pytest.mark.parametrize("backend", ["quadratic", *LINEAR])
def test_document_ignores_what_precedes_it(backend):
    case = attention_case(T=30, window=4, rotary=True, bias=(2, 30), B=2)
    segments = torch.zeros(2, 30, dtype=torch.int64)
    segments[:, 13:] = 1
    got = run(case.with_extra(segments=segments), backend)
    want = run(case.tokens(13, 30), backend)
    for name in ("o", "dq", "dk_hat", "dv", "dbias"):
        assert_same({name: got[name][:, :, 13:]}, {name: want[name]}, rtol=1e-10)
    for name in ("codes", "k_hat", "v", "alive", "count", "mean"):
        assert_same({name: got[f"state.{name}"]}, {name: want[f"state.{name}"]}, rtol=1e-10)


@pytest.mark.parametrize("backend", LINEAR)
@pytest.mark.parametrize("S", [1, 2])
def test_few_codes(backend, S):
    case = attention_case(T=33, window=5, S=S, rotary=True)
    assert_same(run(case, backend), run(case, "quadratic"), rtol=1e-10)


@pytest.mark.parametrize("backend", ["quadratic", *LINEAR])
def test_bf16_is_finite_and_close(backend):
    case = attention_case(T=70, window=8, block_len=16, dtype=torch.bfloat16, bias=(1, 70))
    exact = {name: x.double() if x.is_floating_point() else x for name, x in case.tensors.items()}
    want = run(replace(case, tensors=exact, weights=case.weights.double()), "quadratic")
    got = run(case, backend)
    assert got["o"].dtype == got["dq"].dtype == torch.bfloat16
    assert_same(got, {name: x.to(got[name].dtype) for name, x in want.items()}, rtol=2e-2)


@pytest.mark.parametrize("backend", ["quadratic", *LINEAR])
def test_large_logits_and_values_stay_finite(backend):
    case = attention_case(T=40, window=4, dtype=torch.float32)
    huge = {**case.tensors, "q": case.tensors["q"] * 1e4, "v": case.tensors["v"] * 1e30}
    got = run(replace(case, tensors=huge), backend)
    assert all(x.isfinite().all() for x in got.values())


def test_blockwise_writes_every_entry(monkeypatch):
    """New memory is filled with NaN, so that what is forgotten shows."""
    monkeypatch.setitem(blocks.ROWS, "cpu", 32)
    case = attention_case(T=37, window=5, block_len=8, H=4, bias=(2, 37), rotary=True, segments=True)
    want = run(case, "blockwise")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert_same(run(case, "blockwise"), want, rtol=1e-12)
    finally:
        torch.use_deterministic_algorithms(False)


def test_blockwise_gradient_is_the_slope_of_its_output():
    """With every key in the window no gradient is cut, so finite differences see the same."""
    case = attention_case(T=9, window=9, block_len=4, H=2, Hkv=1, bias=(1, 9), rotary=True, B=1)
    names = ["q", "k_hat", "v", "bias"]

    def o(*learn):
        return call(
            replace(case, tensors={**case.tensors, **dict(zip(names, learn, strict=True))}), backend="blockwise"
        )[0]

    learn = [case.tensors[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(o, learn, fast_mode=True)


@pytest.mark.parametrize("backend", LINEAR)
def test_no_gradient_is_asked_of_an_evaluation(backend):
    case = attention_case(T=20, rotary=True)
    with torch.inference_mode():
        o, state = call(case, backend=backend)
        call(case, state, backend=backend)
    assert not o.requires_grad
    assert torch.equal(o, call(case, backend=backend)[0])


@pytest.mark.parametrize("backend", ["quadratic", *LINEAR])
def test_state_is_detached_and_owns_its_memory(backend):
    case = attention_case(T=50, window=4)
    x = {name: t.clone().requires_grad_() if t.is_floating_point() else t for name, t in case.tensors.items()}
    _, state = call(replace(case, tensors=x), backend=backend)
    want = initial_state(2, 2, 4, 3, 5, 4, torch.float64, "cpu")
    for name, got in state._asdict().items():
        assert (
            not got.requires_grad and got.shape == getattr(want, name).shape and got.dtype == getattr(want, name).dtype
        )
        assert got.untyped_storage().nbytes() <= 2 * max(got.nbytes, 256), name


def test_bf16_keys_do_not_depend_on_the_block_length():
    """A key is a rounded row of the codebook; the cache must see the same row, or L would decide which counts."""
    case = attention_case(T=48, block_len=1, window=4, dtype=torch.float32)
    case = replace(case, tensors={**case.tensors, "k_hat": case.tensors["k_hat"].bfloat16()})
    short, long = (call(case.with_options(block_len=L, backend="blockwise"))[0] for L in (1, 32))
    assert_same({"o": long}, {"o": short}, rtol=1e-5)
