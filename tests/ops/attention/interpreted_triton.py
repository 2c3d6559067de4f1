"""The fused kernels against the definition, interpreted in fp64. Run by test_triton.py in a process of its own.

New memory is filled with NaN, so that what is forgotten shows.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from attention_cases import RULES, attention_case, call, every_pair, run
from helpers import assert_same as same

from transformer_vq.ops.attention import launch, op
from transformer_vq.ops.attention import triton as fused
from transformer_vq.ops.attention.arguments import Arguments
from transformer_vq.ops.attention.call import prepare
from transformer_vq.ops.attention.kernels import tiles
from transformer_vq.ops.attention.kernels.tiles import Tile

SHAPES = [
    {},
    {"Hkv": 1, "H": 4, "bias": "rows"},
    {"Hkv": 1, "H": 2, "rotary": True, "scale": 0.4},
    {"bias": "constant", "cache": False, "segments": True},
    {"segments": True, "mask": "random", "rotary": True, "bias": "rows"},
    {"S": 19, "K": 24, "V": 17},
]
SIZES = [(1, 4, 4), (3, 8, 4), (37, 8, 20), (37, 8, 0), (67, 16, 24), (21, 4, 40), (16, 1, 3), (120, 32, 5)]
QUICK = [
    (SHAPES[0], (37, 8, 5), RULES[0]),
    (SHAPES[1], (37, 8, 20), RULES[2]),
    (SHAPES[2], (37, 5, 7), RULES[3]),
    (SHAPES[3], (21, 4, 3), RULES[1]),
    (SHAPES[4], (37, 8, 3), RULES[0]),
    (SHAPES[5], (1, 4, 4), RULES[0]),
]


def assert_same(got, want, rtol):
    """As usual; what is 0 but for rounding, as dq of a single key, is held against 1."""
    assert got.keys() == want.keys()
    for name, w in want.items():
        zero = w.numel() > 0 and w.abs().max() < 1e-12
        same({name: got[name] + 1 if zero else got[name]}, {name: w + 1 if zero else w}, rtol)


@pytest.fixture(autouse=True)
def nan_in_new_memory(monkeypatch):
    monkeypatch.setattr(tiles, "INTERPRETED", tiles.INTERPRETED._replace(renewal=16, group=2))
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def compare(shape, sizes, rule, rtol=1e-10, dtype=torch.float64):
    (T, block_len, window), (gradients, through), shape = sizes, rule, dict(shape)
    bias = {"rows": (2, T), "constant": (1, 1), None: None}[shape.pop("bias", None)]
    options = {"gradients": gradients, "grad_through_cache": through}
    case = attention_case(T=T, block_len=block_len, window=window, bias=bias, **shape, **options)
    want = run(case, "quadratic")
    narrow = {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.tensors.items()}
    got = run(replace(case, tensors=narrow, weights=case.weights.to(dtype)), "triton")
    assert_same({name: x.double() for name, x in got.items()}, {name: x.double() for name, x in want.items()}, rtol)


@pytest.mark.parametrize(("shape", "sizes", "rule"), QUICK, ids=str)
def test_equals_the_definition(shape, sizes, rule):
    compare(shape, sizes, rule)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "sizes", "rule"), every_pair(SHAPES, SIZES), ids=str)
def test_equals_the_definition_for_every_pair_of_settings(shape, sizes, rule):
    compare(shape, sizes, rule)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("tile", [Tile(32, 16, 4), Tile(16, 32, 4, split=False)], ids=str)
def test_tiles_do_not_show(monkeypatch, rule, tile):
    renewal = 16 if rule[1] == tile.split else 48  # with either, every rule and every tile
    other = tiles.Tiles(*[tile] * 5, renewal=renewal, group=1)
    monkeypatch.setattr(tiles, "INTERPRETED", other)
    compare({"rotary": True, "segments": True}, (100, 8, 20), rule)


@pytest.mark.parametrize("shape", [{"segments": True}, {"bias": "rows", "rotary": True}], ids=str)
def test_one_loop_over_a_strip_gives_what_several_give(monkeypatch, shape):
    monkeypatch.setattr(tiles, "INTERPRETED", tiles.Tiles(*[Tile(16, 16, 4, split=False)] * 5, renewal=16, group=2))
    compare(shape, (37, 8, 9), RULES[0])


def test_rows_more_than_2_to_the_31_entries_apart(monkeypatch):
    """From one tile of 16 to the next. Memory that is only reserved: of 11 GB, the rows of q, k, v and dL/do exist."""
    monkeypatch.setattr(torch.UntypedStorage, "copy_", lambda self, source, *_: self)  # the interpreter's, onto itself
    far = 2**27
    with tempfile.TemporaryFile() as file:
        memory = np.memmap(file, dtype=np.float32, mode="w+", shape=(20 * far,))
    case = attention_case(T=20, window=3, B=1, H=1, Hkv=1, dtype=torch.float32, rotary=False)
    spread = {}
    for place, (name, x) in enumerate((*case.tensors.items(), ("weights", case.weights))):
        if name in ("q", "k_hat", "v", "weights"):
            spread[name] = torch.from_numpy(memory)[16 * place :].as_strided(x.shape, (0, 0, far, 1)).copy_(x)
    learn = {name: spread.pop(name).requires_grad_() for name in ("q", "k_hat", "v")}
    plan, x = fused.layout(prepare(Arguments(**{**case.tensors, **learn}, **case.options)))
    assert all(y.stride(2) == far >= 2**31 // 16 for y in (x.q, x.k, x.v))
    o, lse = launch.attend(plan, *x)
    dq, _, dk, _, dv, _ = launch.gradients(plan, *x, o, lse, spread["weights"])
    want = run(case, "quadratic")
    got = {"o": o, "dq": dq, "dk_hat": dk, "dv": dv}
    assert_same({n: y.double() for n, y in got.items()}, {n: want[n].double() for n in got}, 1e-5)


def test_a_training_step_walks_forward_once(monkeypatch):
    calls = []
    monkeypatch.setattr(launch, "attend", lambda *x, attend=launch.attend: calls.append(1) or attend(*x))
    run(attention_case(), "triton")
    assert len(calls) == 1


def test_opcheck():
    case = attention_case(bias=(1, 13), rotary=True, backend="triton")
    values = op.flat(prepare(Arguments(**case.tensors, **case.options, **case.extra)).with_leaves())
    torch.library.opcheck(op.attend_op._opoverload, (*values, True))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float16, 1e-2)], ids=str)
def test_narrower_types(dtype, rtol):
    compare({}, (37, 8, 5), RULES[0], rtol, dtype)


def moved(case, rule, pieces):
    """Calls that carry the state on, each with another codebook."""
    state, first = None, 0
    for n in pieces:
        piece = case.tokens(first, first + n)
        codebook = case.tensors["codebook"] * (1 + 0.1 * first)
        k_hat = torch.take_along_dim(codebook[None], piece.tensors["codes"][..., None], dim=2)
        piece = replace(piece, tensors={**piece.tensors, "codebook": codebook, "k_hat": k_hat})
        assert_same(run(piece, "triton", state), run(piece, "quadratic", state), rtol=1e-10)
        _, state = call(piece, state, backend="quadratic")
        first += n


def test_state_carries_over_under_a_moving_codebook():
    moved(attention_case(T=30, window=6, block_len=4), RULES[0], (9, 21))


CARRIED = [{"rotary": True, "H": 4}, {"bias": (1, 43)}, {"segments": True, "mask": "random"}, {"cache": False}]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "window", "rule"), every_pair(CARRIED, [0, 3, 9, 20]), ids=str)
def test_every_state_carries_over(shape, window, rule):
    options = {"gradients": rule[0], "grad_through_cache": rule[1]}
    moved(attention_case(T=43, window=window, block_len=4, **shape, **options), rule, (9, 1, 2, 31))


@pytest.mark.parametrize("shape", [{"rotary": True, "H": 4}, {"bias": (2, 37)}], ids=str)
def test_an_exact_window(shape):
    case = attention_case(T=37, block_len=8, window=5, exact_window=True, **shape)
    case = replace(case, tensors={**case.tensors, "k_hat": torch.randn_like(case.tensors["k_hat"])})
    assert_same(run(case, "triton"), run(case, "quadratic"), 1e-10)


def test_a_key_among_millions_still_gets_its_gradient():
    """log n and log (n+1) are one number in fp32; what enters the cache is told by exact counts."""
    case = attention_case(T=37, window=2, B=1, H=1, Hkv=1, S=2, dtype=torch.float32)
    _, state = call(attention_case(T=5, window=2, B=1, H=1, Hkv=1, S=2, dtype=torch.float32), backend="quadratic")
    state = state._replace(count=torch.full_like(state.count, 4e6))
    assert_same(run(case, "triton", state), run(case, "quadratic", state), rtol=1e-4)


def test_transposed_tensors():
    case = attention_case(T=20, window=3)
    turned = {
        name: x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x for name, x in case.tensors.items()
    }
    assert_same(run(replace(case, tensors=turned), "triton"), run(case, "triton"), rtol=1e-12)


def test_two_runs_are_equal_bit_for_bit():
    case = attention_case(T=20, window=3, bias=(1, 1), dtype=torch.float32)
    one, other = run(case, "triton"), run(case, "triton")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"K": 258}, "at most 256 wide, not K = 258"), ({"dtype": torch.bfloat16}, "takes float16, float32, float64")],
    ids=str,
)
def test_what_it_cannot_do_is_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        call(attention_case(**change), backend="triton")
    assert "\n" not in str(error.value)
