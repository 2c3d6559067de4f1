"""Nearest codes against the plain definition, at every size of number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpret import interpret

from transformer_vq.ops import nearest
from transformer_vq.ops.nearest import lookup, nearest_code


def definition(k, codebook, metric="euclidean"):
    """argmin over explicit differences, or argmax over cosines, in fp64."""
    k, codebook = k.double()[..., None, :], codebook.double()[None, :, None]
    if metric == "cosine":
        return torch.cosine_similarity(k, codebook, dim=-1, eps=0).argmax(-1)
    return (k - codebook).square().sum(-1).argmin(-1)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@settings(deadline=None, max_examples=30)
@given(
    B=st.integers(1, 4), H=st.integers(1, 3), T=st.integers(0, 9), K=st.integers(1, 6), S=st.integers(1, 9), seed=...
)
def test_equals_the_definition(metric, B, H, T, K, S, seed: int):
    generator = torch.Generator().manual_seed(seed % 2**32)
    k = torch.randn(B, H, T, K, generator=generator, dtype=torch.float64)
    codebook = torch.randn(H, S, K, generator=generator, dtype=torch.float64)
    codes = nearest_code(k, codebook, metric)
    assert codes.dtype == torch.int64
    if metric == "cosine" and K == 1:  # several codes have the same angle
        return
    assert torch.equal(codes, definition(k, codebook, metric))


@pytest.mark.parametrize(("B", "T"), [(1, 70), (3, 50), (40, 3)])
def test_chunks_do_not_show(monkeypatch, B, T):
    k, codebook = torch.randn(B, 2, T, 5), torch.randn(2, 7, 5)
    whole = nearest_code(k, codebook)
    monkeypatch.setattr(nearest, "ALIVE", 7 * 16)
    assert torch.equal(nearest_code(k, codebook), whole)
    transposed = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(nearest_code(transposed, codebook), whole)


@pytest.mark.parametrize("key_size", [1e-38, 1e-20, 1.0, 1e20, 5e37])
@pytest.mark.parametrize("code_size", [1e-38, 1e-20, 1.0, 1e20, 1e37])
def test_sizes_of_keys_and_codes(key_size, code_size):
    """Squares of these overflow or vanish in fp32; a row of another size beside them changes nothing."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 50, 8, generator=generator) * key_size
    k[0, 0, ::2] = torch.randn(25, 8, generator=generator) * code_size
    codebook = torch.randn(1, 9, 8, generator=generator) * code_size
    keys, codes = k.double() / code_size, codebook.double() / code_size
    want = definition(keys, codes)
    if key_size > 1e15 * code_size:  # then fp64 cannot tell the distances either: the direction decides
        want[0, 0, 1::2] = (keys[0, 0, 1::2] @ codes[0].T).argmax(-1)
    assert torch.equal(nearest_code(k, codebook), want)


def test_the_first_of_equally_near_codes_wins():
    codebook = torch.tensor([[[2.0], [1.0], [-1.0], [1.0]]])
    assert nearest_code(torch.zeros(1, 1, 3, 1), codebook).tolist() == [[[1, 1, 1]]]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_codes_of_keys_that_are_not_finite_are_in_range(bad):
    k = torch.randn(1, 1, 4, 3)
    k[0, 0, 1, 1] = bad
    codebook = torch.randn(1, 5, 3)
    codes = nearest_code(k, codebook)
    assert codes.min() >= 0 and codes.max() < 5
    assert torch.equal(codes[..., [0, 2, 3]], definition(k, codebook)[..., [0, 2, 3]])


def close_call():
    """Keys and codes whose order bf16 cannot tell."""
    generator = torch.Generator().manual_seed(0)
    codebook = 1 + 1e-3 * torch.randn(1, 16, 32, generator=generator)
    return (codebook[:, torch.arange(160) % 16] + 1e-5).unsqueeze(0)[:, 0][None], codebook


def test_distances_are_fp32_under_autocast_and_low_matmul_precision():
    k, codebook = close_call()
    want = torch.arange(160)[None, None] % 16
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(nearest_code(k, codebook), want)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(previous)


def test_bf16_keys_meet_fp32_codes():
    k, codebook = torch.randn(1, 2, 30, 8).bfloat16(), torch.randn(2, 9, 8)
    assert torch.equal(nearest_code(k, codebook), definition(k, codebook))


def test_lookup_returns_rows_bit_for_bit_and_their_gradient():
    codebook = torch.randn(2, 5, 3, requires_grad=True)
    codes = torch.randint(5, (4, 2, 6))
    rows = lookup(codebook, codes)
    want = torch.stack([codebook[h][codes[:, h]] for h in range(2)], 1)
    assert torch.equal(rows, want)
    weight = torch.randn_like(rows)
    got, wanted = (torch.autograd.grad((x * weight).sum(), codebook)[0] for x in (rows, want))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("k", "codebook", "message"),
    [
        ((1, 2, 3, 4), (1, 5, 4), r"codebook has shape \(1, 5, 4\)"),
        ((1, 2, 3, 4), (2, 5, 3), r"need \(2, S, 4\)"),
        ((1, 2, 3, 4), (5, 4), "codebook has shape"),
    ],
)
def test_shapes_must_agree(k, codebook, message):
    with pytest.raises(ValueError, match=message):
        nearest_code(torch.zeros(k), torch.zeros(codebook))


def test_unknown_metric():
    with pytest.raises(ValueError, match="euclidean or cosine"):
        nearest_code(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2), "dot")


@pytest.mark.timeout(900)
def test_the_fused_kernel_equals_the_definition_under_the_interpreter():
    interpret("ops/interpreted_nearest.py", timeout=890)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("arch", "K", "dtype"),
    [
        (90, 128, torch.bfloat16),
        (80, 128, torch.bfloat16),
        *(
            pytest.param(arch, K, dtype, marks=pytest.mark.slow)
            for arch in (80, 90, 100)
            for K in (64, 128, 256)
            for dtype in (torch.bfloat16, torch.float32)
        ),
    ],
    ids=str,
)
def test_the_fused_kernel_fits_the_device(monkeypatch, arch, K, dtype):
    pytest.importorskip("triton")
    from ops.attention.compiled import as_row, launches, show

    from transformer_vq.ops.kernels import nearest as fused

    monkeypatch.setattr(fused, "architecture", lambda device: arch)
    k = torch.empty(2, 300, 8, K, dtype=dtype, device="meta").transpose(1, 2)
    with launches(arch) as made:
        codes = fused.nearest(k, *(torch.empty(shape, device="meta") for shape in ((8, 512, K), (8, 512), (8,))))
    assert codes.shape == (2, 8, 300)
    (row,) = [as_row(*launch) for launch in made]
    print(show(row, arch))
    assert not row.faults(arch), show(row, arch)
