"""Value and gradients against the formula under autograd, and against differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_vq.ops.rms_norm import rms_norm

EPS = 1e-3


def definition(x, weight, bias, scale, eps):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * scale
    return (y if weight is None else y * weight + bias).to(x.dtype)


def tensors(shape, dtype=torch.float64, learned=True):
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, shape[-1:], shape[-1:]) if learned else (shape,)
    made = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]
    return made if learned else [*made, None, None]


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), max_size=3), st.integers(1, 9), st.floats(-12, 12), st.floats(0.1, 3), st.booleans())
def test_equals_the_formula_at_every_scale(before, width, exponent, scale, learned):
    x, *own = tensors((*before, width), learned=learned)
    x = (x.detach() * 10**exponent).requires_grad_()
    inputs = [t for t in (x, *own) if t is not None]
    got, want = (f(x, *own, scale, EPS) for f in (rms_norm, definition))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    slope = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=want.dtype)
    found, right = (torch.autograd.grad(y, inputs, slope) for y in (got, want))
    size = (x.detach().square().mean(-1, keepdim=True) + EPS).sqrt() / scale  # of a gradient of x, one over it
    for i, (ours, theirs) in enumerate(zip(found, right, strict=True)):
        unit = size if i == 0 else 1.0
        torch.testing.assert_close(ours * unit, theirs * unit, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("learned", [True, False])
def test_first_and_second_derivative_against_differences(learned):
    x, *own = tensors((2, 3, 5), learned=learned)
    inputs = [t for t in (x, *own) if t is not None]

    def normed(*given):
        return rms_norm(*given, *own[len(given) - 1 :], 0.7, EPS)

    assert torch.autograd.gradcheck(normed, inputs)
    assert torch.autograd.gradgradcheck(normed, inputs)


@pytest.mark.parametrize("learned", [True, False])
def test_sixteen_bits_are_worked_in_fp32(learned):
    x, *own = tensors((4, 256), torch.bfloat16, learned)
    inputs = [t for t in (x, *own) if t is not None]
    wide = [t.detach().float().requires_grad_() for t in inputs]
    got = rms_norm(x, *own, 1.0, EPS)
    want = definition(*(wide if learned else [*wide, None, None]), 1.0, EPS)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want.bfloat16())
    slope = torch.ones_like(got)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, slope), torch.autograd.grad(want, wide, slope.float()), strict=True
    ):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-2, atol=1e-2)


def test_strided_rows():
    joint = torch.randn(3, 4, 10, dtype=torch.float64, requires_grad=True)
    x = joint.transpose(0, 1)[..., :6]
    slope = torch.randn(x.shape, dtype=torch.float64)
    found = [torch.autograd.grad(f(x, None, None, 2.0, EPS), joint, slope)[0] for f in (rms_norm, definition)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
