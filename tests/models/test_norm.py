"""The norm against its formula, with the paper's place for ε."""

import torch
from helpers import assert_same
from hypothesis import given
from hypothesis import strategies as st

from transformer_vq.models.norm import RMSNorm, rms_normalize


@given(st.floats(-12, 12), st.integers(1, 9))
def test_equals_the_formula_at_every_scale(exponent, width):
    """At 1e-12 only ε counts, inside the root and added to the mean square; at 1e12 it does not."""
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 10**exponent
    want = torch.stack([row / (1e-6 + (row**2).sum() / width) ** 0.5 for row in x])
    assert_same({"y": rms_normalize(x)}, {"y": want}, rtol=1e-12)


def test_gain_and_bias_act_on_the_normed_input():
    norm, x = RMSNorm(4).double(), torch.randn(2, 4, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(4.0))
        norm.bias.fill_(0.5)
    assert_same({"y": norm(x)}, {"y": rms_normalize(x) * torch.arange(4) + 0.5}, rtol=1e-12)


def test_bf16_is_normed_in_fp32():
    x = (torch.randn(2, 512, generator=torch.Generator().manual_seed(0)) * 300).bfloat16()
    y = RMSNorm(512)(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rms_normalize(x.float()).bfloat16())
