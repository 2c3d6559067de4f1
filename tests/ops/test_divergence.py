"""KL of two softmaxes: by its definition, its gradient in closed form, and the same in pieces."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same

from transformer_vq.ops import divergence
from transformer_vq.ops.divergence import summed_divergence


def case(N=7, V=11, dtype=torch.float64):
    torch.manual_seed(0)
    logits, wanted = (torch.randn(N, V, dtype=dtype) * 3 for _ in range(2))
    return logits.requires_grad_(), wanted, torch.tensor([True, False, True, True, True, False, True])


def test_value_and_gradient():
    logits, wanted, counted = case()
    total = summed_divergence(logits, wanted, counted)
    p, q = wanted.softmax(-1), logits.softmax(-1)
    want = sum(
        (p[n, v] * (p[n, v] / q[n, v]).log() for n in range(7) if counted[n] for v in range(11)), torch.zeros(())
    )
    (gradient,) = torch.autograd.grad(total, logits)
    assert_same({"kl": total, "gradient": gradient}, {"kl": want, "gradient": (q - p) * counted[:, None]}, rtol=1e-12)
    assert summed_divergence(logits + 5, logits, counted).abs() < 1e-12


def test_pieces_change_nothing(monkeypatch):
    logits, wanted, counted = case(dtype=torch.float32)
    whole = summed_divergence(logits, wanted, counted)
    (gradient,) = torch.autograd.grad(whole, logits)
    monkeypatch.setattr(divergence, "HELD", 22)
    pieces = summed_divergence(logits, wanted, counted)
    (again,) = torch.autograd.grad(pieces, logits)
    assert_same({"kl": pieces, "gradient": again}, {"kl": whole, "gradient": gradient}, rtol=1e-6)


def test_shapes_are_compared():
    logits, wanted, counted = case()
    with pytest.raises(ValueError, match=r"logits \(7, 11\), wanted \(7, 10\)"):
        summed_divergence(logits, wanted[:, :10], counted)
