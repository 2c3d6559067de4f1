"""Where attention goes, compared with loops over single queries and keys whose values are their own names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import attention_case, call, naive
from helpers import assert_same
from torch import Tensor

from transformer_vq.ops.attention import full_attention
from transformer_vq.ops.attention.arguments import Arguments
from transformer_vq.ops.attention.mass import Mass, attention_mass, full_mass

SHAPES = [
    {},
    {"T": 1},
    {"S": 1},
    {"window": 0, "rotary": True},
    {"H": 4, "Hkv": 2, "bias": (2, 13)},
    {"H": 4, "Hkv": 1, "rotary": True, "scale": 0.3},
    {"segments": True, "window": 2, "bias": (1, 1)},
    {"window": 20},
    {"cache": False, "bias": (2, 1)},
]


def named(shape: dict):
    """A case whose value of key j is the j-th unit vector: the output is then the probabilities themselves."""
    case = attention_case(**{"T": 13, **shape})
    B, Hkv, T, _ = case.tensors["v"].shape
    v = torch.eye(T, dtype=torch.float64).expand(B, Hkv, T, T)
    return replace(case, tensors={**case.tensors, "v": v}, weights=case.weights[..., :1].expand(-1, -1, -1, T))


def shared_out(p: Tensor, window: int, codes: Tensor | None = None, size: int = 0) -> dict[str, Tensor]:
    """p (B, H, T, T) -> what `Mass` holds, pair by pair."""
    B, H, T, _ = p.shape
    out = {name: p.new_zeros(B, H, T) for name in ("itself", "window", "beyond")}
    Hkv = 1 if codes is None else codes.shape[1]
    out["by_code"] = p.new_zeros(B, Hkv, size)
    for b in range(B):
        for h in range(H):
            for i in range(T):
                for j in range(i + 1):
                    name = "itself" if i == j else "window" if i - j <= window else "beyond"
                    out[name][b, h, i] += p[b, h, i, j]
                    if name == "beyond" and codes is not None:
                        g = h // (H // Hkv)
                        out["by_code"][b, g, codes[b, g, j]] += p[b, h, i, j]
    return out


def measured(case, pieces: list[int]) -> dict[str, Tensor]:
    """The same by the operation, called piece by piece with the state carried."""
    first, state, parts = 0, None, []
    for n in pieces:
        piece = case.tokens(first, first + n)
        parts.append(attention_mass(Arguments(**piece.tensors, **piece.options, **piece.extra, state=state)))
        _, state = call(piece, state)
        first += n
    return joined(parts)


def joined(parts: list[Mass]) -> dict[str, Tensor]:
    shares = {name: torch.cat([getattr(m, name) for m in parts], 2) for name in ("itself", "window", "beyond")}
    return {**shares, "by_code": torch.stack([m.by_code for m in parts]).sum(0)}


@pytest.mark.parametrize("pieces", [[13], [1, 4, 8], [1] * 13], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shares_equal_loops_over_pairs(shape, pieces):
    if shape.get("T") == 1:
        pieces = [1]
    case = named(shape)
    window, cached = case.options["window"], case.options.get("cache", True)
    want = shared_out(naive(case)["o"], window, case.tensors["codes"], case.tensors["codebook"].shape[1])
    if not cached:
        want["by_code"] = want["by_code"][..., :0]
    got = measured(case, pieces)
    assert_same(got, want, rtol=1e-12)
    total = got["itself"] + got["window"] + got["beyond"]
    assert (total - 1).abs().max() < 1e-12
    if cached:  # what lies beyond is all there by code
        assert torch.allclose(got["by_code"].sum((1, 2)), got["beyond"].sum((1, 2)), rtol=1e-12)


def test_a_code_in_the_cache_counts_as_often_as_it_has_keys():
    """The mean-field form: n_s exp(q·c_s) over Σ_s n_s exp(q·c_s) + Σ_j exp(q·k_j), with a state that was made up."""
    case = attention_case(T=3, window=2, B=1, H=1, Hkv=1, S=4)
    _, state = call(case)
    count = torch.tensor([[[3.0, 0.0, 500.0, 1.0]]], dtype=torch.float64)
    state = state._replace(count=count, alive=torch.zeros_like(state.alive))
    x = {name: t if name == "codebook" else t[:, :, :1] for name, t in case.tensors.items()}
    got = attention_mass(Arguments(**x, window=2, block_len=4, state=state))
    cached = count[0, 0] * (x["codebook"][0] @ x["q"][0, 0, 0]).exp()
    own = (x["k_hat"][0, 0, 0] @ x["q"][0, 0, 0]).exp()
    assert torch.allclose(got.by_code[0, 0], cached / (cached.sum() + own), rtol=1e-12)
    assert torch.allclose(got.itself[0, 0, 0], own / (cached.sum() + own), rtol=1e-12) and got.window.sum() == 0


@pytest.mark.parametrize("pieces", [[13], [4, 1, 8]], ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if not {"cache", "S", "T", "scale"} & s.keys()], ids=str)
def test_full_attention_is_shared_out_too(shape, pieces):
    case = named(shape)
    M, first, state, parts, p = case.options["window"], 0, None, [], []
    for n in pieces:
        piece = case.tokens(first, first + n)
        options = {"bias": piece.tensors.get("bias"), **{"rotary": None, "segments": None}, **piece.extra}
        q, k, v = (piece.tensors[name] for name in ("q", "k_hat", "v"))
        parts.append(full_mass(q, k, M, state=state, **options))
        o, state = full_attention(q, k, v, M, state=state, **options)
        p.append(o)
        first += n
    want = shared_out(torch.cat(p, 2), M)
    got = joined(parts)
    del want["by_code"], got["by_code"]
    assert_same(got, want, rtol=1e-12)


def test_padding_is_refused():
    case = attention_case(mask="left")
    with pytest.raises(ValueError, match="takes no mask"):
        attention_mass(Arguments(**case.tensors, **case.options, **case.extra))
