"""Products of 16 bits: as exact as 16 bits allow, and with more of them the definition itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from attention_cases import Case, attention_case, call, every_triple, run
from helpers import assert_same
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from transformer_vq.ops.attention import wide
from transformer_vq.ops.attention.blockwise import Manner, block_length

SIZES = [(67, 16, 24), (37, 8, 0), (21, 4, 40), (1, 4, 4)]
SHAPES = [
    {},
    {"Hkv": 1, "H": 4, "bias": "rows", "scale": 0.4},
    {"Hkv": 2, "H": 4, "rotary": True, "scale": 0.4},
    {"bias": "constant", "cache": False, "segments": True},
    {"segments": True, "mask": "random", "rotary": True, "bias": "rows"},
]


@pytest.fixture
def narrow_is_fp32(monkeypatch):
    """fp32 products under fp64 sums: what is narrowed, where and how it is scaled shows to seven digits."""
    monkeypatch.setattr(wide, "manner", lambda call: Manner(torch.float32, block_length(call, 128), 20))


@pytest.mark.parametrize(("shape", "sizes", "rule"), every_triple(SHAPES, SIZES), ids=str)
def test_narrow_products_equal_the_definition(narrow_is_fp32, shape, sizes, rule):
    (T, block_len, window), shape = sizes, dict(shape)
    bias = {"rows": (2, T), "constant": (1, 1), None: None}[shape.pop("bias", None)]
    rule = {"gradients": rule[0], "grad_through_cache": rule[1]}
    case = attention_case(T=T, block_len=block_len, window=window, bias=bias, **shape, **rule)
    got, want = run(case, "wide"), run(case, "quadratic")
    largest = max(x.abs().max() for n, x in want.items() if n.startswith("d"))
    for name in got:  # where one key alone is seen, some gradients are 0 and what is left is rounding
        size = largest if name.startswith("d") else want[name].abs().max() if want[name].numel() else 0
        assert want[name].numel() == 0 or (got[name] - want[name]).abs().max() <= 2e-6 * size, name


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_narrow_products_after_a_state_under_a_moving_codebook(narrow_is_fp32, shape):
    shape = {**shape, "bias": (1, 1)} if "bias" in shape else shape
    case = attention_case(T=40, window=9, **shape)
    _, state = call(case)
    moved = case.tensors["codebook"] * 1.1
    k_hat = torch.take_along_dim(moved[None], case.tensors["codes"][..., None], dim=2)
    case = replace(case, tensors={**case.tensors, "codebook": moved, "k_hat": k_hat})
    assert_same(run(case, "wide", state), run(case, "quadratic", state), rtol=2e-6)


def full_attention(case: Case) -> dict[str, Tensor]:
    """What PyTorch's own full attention gives in the case's type; on a CPU it works in fp32 and rounds once."""
    q, k, v = (case.tensors[name].clone().requires_grad_() for name in ("q", "k_hat", "v"))
    with sdpa_kernel(SDPBackend.MATH):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=case.options["scale"], enable_gqa=True)
    dq, _, dv = torch.autograd.grad((o * case.weights).sum(), (q, k, v))
    return {"o": o.detach(), "dq": dq, "dv": dv}


def compare_with_full_attention(device: str, dtype: torch.dtype, **sizes) -> None:
    case = attention_case(dtype=dtype, scale=sizes["K"] ** -0.5, **sizes)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in case.tensors.items()}
    want = run(replace(case, tensors=exact, weights=case.weights.double()), "quadratic")
    tensors = {name: x.to(device) for name, x in case.tensors.items()}
    case = replace(case, tensors=tensors, weights=case.weights.to(device))
    got, usual = run(case, "wide"), full_attention(case)
    for name in ("o", "dq", "dv"):
        assert got[name].dtype == dtype
        errors = [(x[name].cpu().double() - want[name]).square().mean().sqrt() for x in (got, usual)]
        assert errors[0] <= 2 * errors[1], f"{name}: {errors[0]:.1e}, full attention {errors[1]:.1e}"
        largest = [(x[name].cpu().double() - want[name]).abs().max() for x in (got, usual)]
        assert largest[0] <= 2.5 * largest[1], f"{name}: {largest[0]:.1e}, full attention {largest[1]:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [{}, {"H": 4, "Hkv": 2}], ids=str)
def test_errors_of_16_bits_are_those_of_full_attention(dtype, heads):
    compare_with_full_attention("cpu", dtype, T=400, window=60, block_len=64, K=32, V=288, S=24, **heads)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("V", [512, 1536])
def test_on_a_gpu_errors_of_16_bits_are_those_of_full_attention(dtype, V):
    compare_with_full_attention("cuda", dtype, T=1500, window=256, block_len=256, K=128, V=V, S=128, H=2)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_gpu_it_equals_the_definition(shape):
    shape = dict(shape)
    bias = {"rows": (2, 700), "constant": (1, 1), None: None}[shape.pop("bias", None)]
    case = attention_case(T=700, window=100, block_len=64, bias=bias, **shape)
    want = run(case, "quadratic")
    tensors = {name: x.cuda() for name, x in case.tensors.items()}
    extra = {name: x if x is None else x.cuda() for name, x in case.extra.items()}
    got = run(replace(case, tensors=tensors, weights=case.weights.cuda(), extra=extra), "wide")
    assert_same({name: x.cpu() for name, x in got.items()}, want, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_everything_at_once_in_16_bits(dtype):
    case = attention_case(T=70, window=8, block_len=16, H=4, K=8, V=6, bias=(1, 70), rotary=True, segments=True)
    case = case.with_options(scale=0.3)
    want = run(case, "quadratic")
    narrow = {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.tensors.items()}
    got = run(replace(case, tensors=narrow, weights=case.weights.to(dtype)), "wide")
    assert all(got[name].dtype == dtype for name in ("o", "dq", "dk_hat", "dv", "dbias"))
    names = ("o", "dq", "dk_hat", "dv", "dbias")
    assert_same({n: got[n].double() for n in names}, {n: want[n] for n in names}, rtol=2e-2)
