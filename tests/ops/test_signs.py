"""Entropies of sign codes against the sum over all 2^d codes."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same

from transformer_vq.ops.fsq import codes_to_digits
from transformer_vq.ops.signs import sign_entropies, signs


def all_codes(bits, size):
    return (2.0 * codes_to_digits(torch.arange(2**bits), [2] * bits) - 1).double() * size


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("size", [1.0, 0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_entropies(size, temperature, masked):
    bits = 4
    z = torch.randn(3, 2, 5, bits, dtype=torch.float64)
    mask = torch.rand(3, 5) > 0.4 if masked else None
    p = (-(z[..., None, :] - all_codes(bits, size)).square().sum(-1) / temperature).softmax(-1)
    real = p.transpose(1, 2)[mask if masked else torch.ones(3, 5, dtype=torch.bool)]  # (N, H, S)
    want_each = torch.special.entr(real).sum(-1).mean()
    positive = all_codes(bits, 1.0) > 0
    bit = torch.einsum("nhs,sd->hd", real, positive.double()) / len(real)
    want_mean = (torch.special.entr(bit) + torch.special.entr(1 - bit)).sum(-1).mean()
    each, mean = sign_entropies(z, size, temperature, mask)
    assert_same({"each": each, "mean": mean}, {"each": want_each, "mean": want_mean}, rtol=1e-10)
    exact = torch.special.entr(real.mean(0)).sum(-1).mean()
    assert mean >= exact - 1e-12  # treating bits as independent is an upper bound


def test_saturated_signs_have_finite_gradients():
    z = (100 * torch.randn(1, 1, 6, 3)).requires_grad_()
    each, mean = sign_entropies(z, 1.0, 0.01, None)
    (each - mean).backward()
    assert z.grad.isfinite().all()


def test_zero_counts_as_positive():
    assert signs(torch.tensor([-2.0, -0.0, 0.0, 3.0])).tolist() == [-1, 1, 1, 1]
