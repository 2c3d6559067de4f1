"""Health metrics against plain loops."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same

from transformer_vq.ops.nearest import lookup, nearest_code
from transformer_vq.quantizers.health import batch_health, code_counts, perplexity, running_health
from transformer_vq.quantizers.losses import squared_distance

H, S = 2, 7


@pytest.mark.parametrize("masked", [False, True])
def test_batch_health(masked):
    generator = torch.Generator().manual_seed(0)
    k, c = torch.randn(3, H, 9, 4, generator=generator), torch.randn(H, S, 4, generator=generator)
    mask = torch.rand(3, 9, generator=generator) > 0.4 if masked else torch.ones(3, 9, dtype=torch.bool)
    codes = nearest_code(k, c)
    q = lookup(c, codes)
    counts = code_counts(codes, S, mask if masked else None)
    got = batch_health(k, q, squared_distance(k, q), counts, mask if masked else None)
    keys, rows = (x.transpose(1, 2)[mask] for x in (k, q))  # (N, H, K)
    n = torch.stack([torch.bincount(codes[:, h][mask], minlength=S) for h in range(H)])
    p = n / n.sum(-1, keepdim=True)
    want = {
        "usage": (n > 0).float().mean(),
        "perplexity": torch.special.entr(p).sum(-1).exp().mean(),
        "norm_ratio": (rows.norm(dim=-1) / keys.norm(dim=-1)).mean(),
        "cosine": torch.cosine_similarity(keys, rows, dim=-1).mean(),
        "relative_error": ((keys - rows).norm(dim=-1) / keys.norm(dim=-1)).clamp(max=10).mean(),
    }
    assert torch.equal(counts, n.float())
    assert_same(got, want, rtol=1e-5)


def test_relative_error_is_capped_and_zero_keys_give_numbers():
    k, q = torch.zeros(1, 1, 2, 3), torch.ones(1, 1, 2, 3)
    got = batch_health(k, q, squared_distance(k, q), torch.ones(1, 2), None)
    assert got["relative_error"] == 10
    assert all(value.isfinite() for name, value in got.items() if name != "norm_ratio")


def test_perplexity_of_even_single_and_absent_use():
    assert perplexity(torch.ones(2, 8)).item() == pytest.approx(8)
    assert perplexity(torch.eye(8)[:2]).item() == pytest.approx(1)
    assert perplexity(torch.zeros(2, 8)) == 0


def test_running_health():
    got = running_health(torch.tensor([[0.5, 2.0, 2.0, 2.0], [0.1, 0.2, 1.0, 1.0]]), 1.0)
    assert got["dead_codes"] == 1.5
    assert got["running_perplexity"] > 2
