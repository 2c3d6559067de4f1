"""The fused nearest-code kernel against the definition, interpreted. Run by test_nearest.py in a process of its own."""

from __future__ import annotations

import pytest
import torch
from ops.test_nearest import close_call, definition

from transformer_vq.ops import nearest as reference
from transformer_vq.ops.kernels import nearest as fused
from transformer_vq.ops.nearest import nearest_code


@pytest.fixture(autouse=True)
def small_tiles_and_no_other_way(monkeypatch):
    monkeypatch.setattr(fused, "tile", lambda arch, K, split: fused.Tile(16, 16, 4))
    monkeypatch.setattr(reference.itertools, "product", None)  # what the plain way goes through


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("B", "H", "T", "K", "S"), [(1, 1, 1, 4, 1), (2, 3, 37, 24, 45), (1, 2, 16, 16, 16)])
def test_equals_the_definition(metric, dtype, B, H, T, K, S):
    torch.manual_seed(0)
    k, codebook = torch.randn(B, H, T, K).to(dtype), torch.randn(H, S, K)
    turned = k.transpose(1, 2).contiguous().transpose(1, 2)
    for keys in (k, turned):
        assert torch.equal(nearest_code(keys, codebook, metric), definition(k, codebook, metric))


def test_a_codebook_in_three_parts(monkeypatch):
    """As for bf16 keys, whose products the interpreter cannot do."""
    monkeypatch.setattr(fused, "SPLIT", (torch.float16,))
    k, codebook = torch.randn(2, 2, 40, 24).half(), torch.randn(2, 37, 24)
    assert torch.equal(nearest_code(k, codebook), definition(k, codebook))


def test_three_bf16_parts_hold_all_digits():
    x = torch.randn(1000) * torch.exp(4 * torch.randn(1000))
    parts = fused.thirds(x, torch.bfloat16)
    assert len(parts) == 3 and (sum(p.double() for p in parts) - x.double()).abs().le(x.abs().double() * 2**-23).all()


@pytest.mark.parametrize(
    ("key_size", "code_size"),
    [(1, 1e-25), (1, 1e25), (1e-25, 1), (1e25, 1), (1e25, 1e25), (1e-25, 1e-25), (5e37, 1e-38), (1e-38, 1e37)],
)
def test_sizes_of_keys_and_codes(key_size, code_size):
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 50, 8, generator=generator) * key_size
    k[0, 0, ::2] = torch.randn(25, 8, generator=generator) * code_size
    codebook = torch.randn(1, 9, 8, generator=generator) * code_size
    keys, codes = k.double() / code_size, codebook.double() / code_size
    want = definition(keys, codes)
    if key_size > 1e15 * code_size:
        want[0, 0, 1::2] = (keys[0, 0, 1::2] @ codes[0].T).argmax(-1)
    assert torch.equal(nearest_code(k, codebook), want)


def test_the_first_of_equally_near_codes_wins():
    codebook = torch.tensor([2.0, 1.0, -1.0, 1.0]).repeat(10)[None, :, None]  # over several tiles
    assert nearest_code(torch.zeros(1, 1, 3, 1), codebook).tolist() == [[[1, 1, 1]]]
    codebook = torch.randn(1, 20, 8).repeat(1, 3, 1)
    assert nearest_code(codebook[None] + 1e-3, codebook).max() < 20


def test_close_calls():
    k, codebook = close_call()
    assert torch.equal(nearest_code(k, codebook), torch.arange(160)[None, None] % 16)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_codes_of_keys_that_are_not_finite_are_in_range(bad):
    k = torch.randn(1, 1, 4, 3)
    k[0, 0, 1, 1] = bad
    codebook = torch.randn(1, 5, 3)
    codes = nearest_code(k, codebook)
    assert codes.min() >= 0 and codes.max() < 5
    assert torch.equal(codes[..., [0, 2, 3]], definition(k, codebook)[..., [0, 2, 3]])


def test_no_key_has_no_code():
    assert nearest_code(torch.zeros(2, 1, 0, 3), torch.zeros(1, 5, 3)).shape == (2, 1, 0)
