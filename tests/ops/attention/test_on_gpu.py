"""The kernels natively, on the cases that the interpreter sees: `pytest -m gpu`.

How far 16 bits may be off is not a number of ours: at most twice what PyTorch's plain attention (`SDPBackend.MATH`) is
off in the same type, root of mean squares over each tensor: late rows are small beside the first ones.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from attention_cases import attention_case, call, every_pair, run
from torch.nn.attention import SDPBackend, sdpa_kernel

from transformer_vq.ops.attention import initial_state, resolve_backend
from transformer_vq.ops.kernels.device import interpreted
from transformer_vq.ops.nearest import nearest_code

pytestmark = pytest.mark.gpu
SHAPES = [
    {},
    {"Hkv": 1, "H": 4, "bias": (2, None)},
    {"Hkv": 1, "H": 2, "rotary": True, "scale": 0.1},
    {"bias": (1, 1), "cache": False, "segments": True},
    {"segments": True, "mask": "random", "rotary": True, "bias": (2, None)},
    {"S": 300, "K": 128, "V": 128},
    {"S": 19, "K": 24, "V": 200},
]
SIZES = [(1, 4, 4), (37, 8, 0), (700, 64, 100), (1500, 512, 512)]
NAMES = ("o", "dq", "dk_hat", "dv")


def on_gpu(case, dtype):
    def move(x):
        return x if x is None else x.cuda().to(dtype) if x.is_floating_point() else x.cuda()

    tensors, extra = ({n: move(x) for n, x in part.items()} for part in (case.tensors, case.extra))
    if "rotary" in extra:
        extra["rotary"] = case.extra["rotary"].cuda()
    return replace(case, tensors=tensors, weights=move(case.weights), extra=extra)


def error(got, want):
    off = got.double().cpu() - want
    return (off.square().mean() / want.square().mean().clamp_min(1e-60)).sqrt().item()


def usual(case, dtype):
    """Errors of PyTorch's plain attention over the same queries, keys and values."""
    found = []
    for kind in (torch.float64, dtype):
        moved = on_gpu(case, kind)
        q, k, v = (moved.tensors[n].clone().requires_grad_() for n in ("q", "k_hat", "v"))
        with sdpa_kernel(SDPBackend.MATH):
            scale = case.options.get("scale", 1.0)
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        grads = torch.autograd.grad((o * moved.weights).sum(), (q, k, v))
        found.append(dict(zip(NAMES, (o.detach(), *grads), strict=True)))
    exact, narrow = found
    return {n: error(narrow[n], exact[n].double().cpu()) for n in NAMES}


def test_kernels_are_compiled_in_this_process():
    assert not interpreted(), "TRITON_INTERPRET=1 is set: unset it"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("shape", "sizes", "rule"), every_pair(SHAPES, SIZES), ids=str)
def test_errors_are_those_of_plain_attention_and_two_runs_are_equal(shape, sizes, rule, dtype):
    (T, block_len, window), (gradients, through), shape = sizes, rule, dict(shape)
    if dtype == torch.float32 and max(shape.get("K", 64), shape.get("V", 64)) > 64:
        pytest.skip("auto never takes it")
    if "bias" in shape:
        shape["bias"] = (shape["bias"][0], shape["bias"][1] or T)
    sizes = {"K": 64, "V": 64, "S": 64, "scale": 0.125, "H": 2, "Hkv": 2} | shape
    options = {"gradients": gradients, "grad_through_cache": through}
    case = attention_case(T=T, block_len=block_len, window=window, dtype=dtype, **sizes, **options)
    exact = replace(
        case,
        tensors={n: x.double() if x.is_floating_point() else x for n, x in case.tensors.items()},
        weights=case.weights.double(),
    )
    want, allowed, moved = run(exact, "quadratic"), usual(case, dtype), on_gpu(case, dtype)
    one, other = run(moved, "triton"), run(moved, "triton")
    assert all(torch.equal(one[name], other[name]) for name in one)
    tiny = torch.finfo(dtype).eps  # where plain attention happens to be exact, as for a single token
    wrong = {n: (error(one[n], want[n]), allowed[n]) for n in NAMES if want[n].abs().max() > 1e-9}
    assert all(got <= max(2 * usual, tiny) for got, usual in wrong.values()), wrong


def test_auto_takes_kernels_and_they_go_on_from_a_state():
    assert resolve_backend("auto", "cuda", 700, 64, 64, torch.bfloat16)[0] == "triton"
    case = on_gpu(attention_case(T=700, window=100, K=64, V=64, S=64, scale=0.125), torch.bfloat16)
    whole, _ = call(case)
    first, state = call(case.tokens(0, 400))
    rest, _ = call(case.tokens(400, 700), state)
    torch.testing.assert_close(torch.cat([first, rest], 2), whole, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("K", [32, 128, 256])
def test_codes_are_those_of_fp64(dtype, K):
    """Only where two codes are equally near as far as fp32 can tell, another may be taken."""
    torch.manual_seed(0)
    k, codebook = torch.randn(2, 2, 3000, K).to(dtype), torch.randn(2, 512, K)
    codes = nearest_code(k.cuda(), codebook.cuda())
    assert torch.equal(codes, nearest_code(k.cuda(), codebook.cuda()))
    distances = torch.cdist(k.double(), codebook.double()[None])
    taken = distances.gather(-1, codes.cpu()[..., None])[..., 0]
    assert (taken - distances.amin(-1)).max() <= 1e-5 * distances.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_decoding_is_what_the_definition_says(dtype):
    from ops.attention.interpreted_ring import token

    from transformer_vq.ops.attention.ring import close_ring, open_ring, step

    case = attention_case(T=300, window=64, K=64, V=64, S=64, H=4, Hkv=2, rotary=True, scale=0.125, dtype=dtype)
    moved = on_gpu(case, dtype)
    state = initial_state(2, 2, 64, 64, 64, 64, dtype, "cuda")
    ring = open_ring(state, moved.tensors["codebook"], rotary=moved.extra["rotary"], scale=0.125)
    for t in range(300):
        want, state = call(moved.tokens(t, t + 1), state, backend="quadratic")
        o, ring = step(ring, *token(moved, t))
        torch.testing.assert_close(o.view_as(want), want, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(close_ring(ring).mean, state.mean, rtol=1e-4, atol=1e-4)
