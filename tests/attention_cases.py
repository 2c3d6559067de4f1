"""Random attention calls, one way to run them, and the slowest possible truth."""

from __future__ import annotations

import cmath
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from transformer_vq.ops import vq_attention
from transformer_vq.ops.attention import AttentionState, native

LEARN = ("q", "k_hat", "v", "bias")
NATIVE = pytest.param("native", marks=pytest.mark.skipif(native.refusal("cpu") is not None, reason="no C++ compiler"))
RULES = [("window", True), ("window", False), ("block", True), ("block", False)]
"""Of gradients: `gradients`, `grad_through_cache`."""


def every_pair(ones: Sequence[Any], others: Sequence[Any]) -> list[tuple[Any, Any, tuple[str, bool]]]:
    """Cases (one, other, rule) in which any two settings meet, at a quarter of the cases of all three together.

    Each pair of the lists, which have four entries or more, once; its rule moves on along both.
    """
    pairs = itertools.product(enumerate(ones), enumerate(others))
    return [(one, other, RULES[(i + j) % len(RULES)]) for (i, one), (j, other) in pairs]


def every_triple(ones: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """All cases (one, other, rule), for `parametrize`; those that `every_pair` leaves out are slow."""
    quick = every_pair(ones, others)
    return [
        pytest.param(*case, marks=() if case in quick else pytest.mark.slow)
        for case in itertools.product(ones, others, RULES)
    ]


@dataclass(frozen=True)
class Case:
    """Tensors of one call, its other arguments, and the weights of the scalar whose gradients are compared."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    weights: Tensor
    extra: dict[str, Tensor | None] = field(default_factory=dict)

    def with_options(self, **options: Any) -> Case:
        return replace(self, options={**self.options, **options})

    def with_extra(self, **extra: Tensor | None) -> Case:
        return replace(self, extra={**self.extra, **extra})

    def tokens(self, first: int, last: int) -> Case:
        """The same call for tokens first … last−1."""
        t = slice(first, last)
        tensors = {name: x if name == "codebook" else x[:, :, t] for name, x in self.tensors.items()}
        if "bias" in tensors and self.tensors["bias"].shape[2] == 1:
            tensors["bias"] = self.tensors["bias"]
        extra = {name: x if x is None or name == "rotary" else x[:, t] for name, x in self.extra.items()}
        return Case(tensors, self.options, self.weights[:, :, t], extra)


def attention_case(
    T: int = 13,
    window: int = 4,
    block_len: int = 4,
    B: int = 2,
    H: int = 2,
    Hkv: int = 2,
    K: int = 4,
    V: int = 3,
    S: int = 5,
    bias: tuple[int, int] | None = None,
    rotary: bool = False,
    segments: bool = False,
    mask: str | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **options: Any,
) -> Case:
    """`bias` gives its axes (batch, time), each 1 or full; `mask` is left | right | middle | random | all."""
    torch.manual_seed(seed)
    codebook = torch.randn(Hkv, S, K, dtype=torch.float64)
    codes = torch.randint(S, (B, Hkv, T))
    tensors = {
        "q": torch.randn(B, H, T, K, dtype=torch.float64),
        "k_hat": torch.take_along_dim(codebook[None], codes[..., None], dim=2),
        "v": torch.randn(B, Hkv, T, V, dtype=torch.float64),
        "codes": codes,
        "codebook": codebook,
    }
    if bias is not None:
        tensors["bias"] = torch.randn(bias[0], H, bias[1], window + 1, dtype=torch.float64)
    tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
    extra: dict[str, Tensor | None] = {}
    if rotary:
        extra["rotary"] = torch.rand(K // 2)
    if segments:
        extra["segments"] = (torch.rand(B, T) < 0.25).long().cumsum(1) % 3
    if mask is not None:
        at = torch.arange(T).expand(B, T)
        third = torch.arange(1, B + 1)[:, None] * T // (B + 2)
        extra["mask"] = {
            "left": at >= third,
            "right": at < T - third,
            "middle": (at < third) | (at >= 2 * third),
            "random": torch.rand(B, T) < 0.6,
            "all": torch.zeros(B, T, dtype=torch.bool) | (torch.arange(B) > 0)[:, None],
        }[mask]
    weights = torch.randn(B, H, T, V, dtype=torch.float64).to(dtype)
    return Case(tensors, {"window": window, "block_len": block_len, **options}, weights, extra)


def call(case: Case, state: AttentionState | None = None, **options: Any) -> tuple[Tensor, AttentionState]:
    return vq_attention(**case.tensors, **case.options, **case.extra, state=state, **options)


def run(case: Case, backend: str, state: AttentionState | None = None) -> dict[str, Tensor]:
    """Output, state and gradients of Σ weights · o."""
    learn = {name: x.clone().requires_grad_() for name, x in case.tensors.items() if name in LEARN}
    o, after = call(replace(case, tensors={**case.tensors, **learn}), state, backend=backend)
    grads = torch.autograd.grad((o * case.weights).sum(), list(learn.values()))
    return (
        {"o": o.detach()}
        | {f"d{name}": g for name, g in zip(learn, grads, strict=True)}
        | {f"state.{name}": x.to(torch.float64) for name, x in after._asdict().items()}
    )


def naive(case: Case, pieces: list[int] | None = None, codebooks: list[Tensor] | None = None) -> dict[str, Tensor]:
    """Output and gradients by the words of the definition: one query, one key, one number at a time.

    `pieces` are the lengths of consecutive calls that carry the state, `codebooks` what each of them has.
    """
    x, options, extra = case.tensors, case.options, case.extra
    B, H, T, _ = x["q"].shape
    Hkv = x["v"].shape[1]
    M, L, scale = options["window"], options["block_len"], options.get("scale")
    rule, through = options.get("gradients", "window"), options.get("grad_through_cache", True)
    pieces = pieces or [T]
    piece_of = [p for p, n in enumerate(pieces) for _ in range(n)]
    codebooks = codebooks or [x["codebook"]] * len(pieces)
    learn = {name: x[name].clone().requires_grad_() for name in LEARN if name in x}
    o = torch.zeros_like(case.weights)

    for b in range(B):
        mask, segments = extra.get("mask"), extra.get("segments")
        tokens = [t for t in range(T) if mask is None or mask[b, t]]
        ids = [0 if segments is None else int(segments[b, t]) for t in tokens]
        for h in range(H):
            g = h // (H // Hkv)
            for i, t in enumerate(tokens):
                first = next(n for n, s in enumerate(tokens) if piece_of[s] == piece_of[t])
                start = first + (i - first) // L * L
                logits, values = [], []
                for j in range(i, -1, -1):
                    if ids[j] != ids[i] or (i - j > M and not options.get("cache", True)):
                        break
                    s = tokens[j]
                    k, v = learn["k_hat"][b, g, s], learn["v"][b, g, s]
                    if rule == "window":
                        k_live, v_live = i - j <= M, i - j <= M or through
                    elif through:
                        k_live, v_live = j >= start - M, True
                    else:
                        k_live, v_live = j >= start, j >= start
                    if piece_of[s] != piece_of[t]:
                        k_live = v_live = False
                    if i - j > M:
                        row = codebooks[piece_of[t]][g, x["codes"][b, g, s]]
                        k = row + k - k.detach()
                    logit = turned(learn["q"][b, h, t], k if k_live else k.detach(), min(i - j, M), extra.get("rotary"))
                    logit = logit * (1 if scale is None else scale)
                    if "bias" in learn and i - j <= M:
                        bias = learn["bias"]
                        logit = logit + bias[b % bias.shape[0], h, t % bias.shape[2], i - j]
                    logits.append(logit)
                    values.append(v if v_live else v.detach())
                o[b, h, t] = torch.stack(logits).softmax(0) @ torch.stack(values)
    grads = torch.autograd.grad((o * case.weights).sum(), list(learn.values()))
    return {"o": o.detach()} | {f"d{name}": g for name, g in zip(learn, grads, strict=True)}


def turned(q: Tensor, k: Tensor, distance: int, rotary: Tensor | None) -> Tensor:
    """⟨R_i q, R_j k⟩ at distance i−j, in complex numbers."""
    if rotary is None:
        return (q * k).sum()
    half = len(q) // 2
    a, b = torch.complex(q[:half], q[half:]), torch.complex(k[:half], k[half:])
    turn = torch.tensor([cmath.exp(1j * distance * f) for f in rotary.double().tolist()], dtype=torch.complex128)
    return (a * b.conj() * turn).real.sum()
