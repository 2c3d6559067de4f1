import pytest
import torch
import torch.nn.functional as F

from transformer_vq.ops.swiglu import swiglu


@pytest.mark.parametrize("shape", [(2, 3, 8), (0, 4), (5, 2)])
def test_value_and_gradient_are_those_of_the_definition(shape):
    joint = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gate, up = joint.chunk(2, -1)
    want = F.silu(gate) * up
    slope = torch.randn_like(want)
    got = swiglu(joint)
    assert torch.equal(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, joint, slope), torch.autograd.grad(want, joint, slope), rtol=1e-14, atol=1e-14
    )


def test_gradient_against_differences():
    torch.autograd.gradcheck(swiglu, torch.randn(3, 6, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("width", [6, 8192])  # by the formula and, where there is a compiler, in C++
def test_a_second_derivative_is_refused(width):
    joint = torch.randn(3, width, requires_grad=True)
    with pytest.raises(RuntimeError, match="out="):
        torch.autograd.grad(swiglu(joint).sum(), joint, create_graph=True)
