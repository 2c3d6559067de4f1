"""The arguments of VQ attention: the one list of their names, types and defaults, and what they must agree on.

Axes:  B batch  H query heads  Hkv key heads  T length  K key width  V value width  S codes  M window
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from transformer_vq.ops.attention.state import AttentionState, initial_state

GRADIENTS = ("window", "block")


@dataclass(frozen=True)
class Arguments:
    """What `vq_attention` takes; it says what each means."""

    q: Tensor
    """(B, H, T, K)."""
    k_hat: Tensor
    """(B, Hkv, T, K)."""
    v: Tensor
    """(B, Hkv, T, V)."""
    codes: Tensor
    """(B, Hkv, T) int64."""
    codebook: Tensor
    """(Hkv, S, K)."""
    _: KW_ONLY
    window: int
    block_len: int | None = None
    scale: float | None = None
    bias: Tensor | None = None
    """(B or 1, H, T or 1, M+1)."""
    rotary: Tensor | None = None
    """(K/2,)."""
    state: AttentionState | None = None
    linked: bool = False
    segments: Tensor | None = None
    """(B, T) int64."""
    mask: Tensor | None = None
    """(B, T) bool."""
    cache: bool = True
    gradients: str = "window"
    grad_through_cache: bool = True
    exact_window: bool = False
    backend: str = "auto"


P = ParamSpec("P")
A = TypeVar("A")
R = TypeVar("R")


def taking(arguments: Callable[P, A]) -> Callable[[Callable[[A], R]], Callable[P, R]]:
    """Turn a function of one record into one that takes the record's fields, with their types, names and defaults."""

    def decorate(function: Callable[[A], R]) -> Callable[P, R]:
        @wraps(function)
        def flat(*args: P.args, **kwargs: P.kwargs) -> R:
            return function(arguments(*args, **kwargs))

        returned = inspect.signature(function).return_annotation
        flat.__signature__ = inspect.signature(arguments).replace(return_annotation=returned)  # type: ignore[attr-defined]
        return flat

    return decorate


def check(x: Arguments) -> None:
    """Raise ValueError, with the shapes, for arguments that do not belong together."""
    if x.block_len is None and x.gradients == "block":
        raise ValueError("gradients='block' needs block_len: gradients depend on it")
    if x.window < 0 or (x.block_len is not None and x.block_len < 1):
        raise ValueError(f"window must be at least 0 and block_len at least 1, not {x.window} and {x.block_len}")
    if x.gradients not in GRADIENTS:
        raise ValueError(f"gradients must be one of {', '.join(GRADIENTS)}, not {x.gradients!r}")
    if x.exact_window and x.gradients != "window":
        raise ValueError(f"exact_window needs gradients='window', not {x.gradients!r}")
    for name, tensor, axes in (("q", x.q, 4), ("v", x.v, 4), ("codebook", x.codebook, 3)):
        if tensor.dim() != axes:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it needs {axes} axes")
    B, H, T, K = x.q.shape
    Hkv, V = x.v.shape[1], x.v.shape[3]
    if Hkv == 0 or H % Hkv:
        raise ValueError(
            f"{H} query heads in q {tuple(x.q.shape)} do not divide among the {Hkv} of v {tuple(x.v.shape)}"
        )
    wanted = [("k_hat", x.k_hat, (B, Hkv, T, K)), ("v", x.v, (B, Hkv, T, V)), ("codes", x.codes, (B, Hkv, T))]
    wanted += [(name, y, (B, T)) for name, y in (("segments", x.segments), ("mask", x.mask)) if y is not None]
    wanted += [("codebook", x.codebook, (Hkv, x.codebook.shape[1], K))]
    if x.rotary is not None:
        if K % 2:
            raise ValueError(f"rotary positions need an even key width; q {tuple(x.q.shape)} has {K}")
        wanted += [("rotary", x.rotary, (K // 2,))]
    for name, tensor, shape in wanted:
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; q {tuple(x.q.shape)} and v need {shape}")
    if x.bias is not None and (
        x.bias.dim() != 4
        or x.bias.shape[0] not in (1, B)
        or x.bias.shape[1] != H
        or x.bias.shape[2] not in (1, T)
        or x.bias.shape[3] != x.window + 1
    ):
        raise ValueError(f"bias has shape {tuple(x.bias.shape)}; it needs ({B} or 1, {H}, {T} or 1, {x.window + 1})")
    if x.mask is not None and x.mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, True where a token is real, not {x.mask.dtype}")
    if x.codes.dtype != torch.int64:
        raise ValueError(f"codes must be int64, not {x.codes.dtype}")
    if x.linked and x.state is None:
        raise ValueError("linked needs the state that gradient flows to")
    if x.state is not None:
        check_state(x.state, (B, Hkv, K, V, x.codebook.shape[1], x.window))


def check_state(state: AttentionState, sizes: tuple[int, int, int, int, int, int]) -> None:
    """Raise ValueError where a state was made for other sizes (B, Hkv, K, V, S, M)."""
    for name, got, want in zip(
        AttentionState._fields, state, initial_state(*sizes, dtype=torch.float32, device="meta"), strict=True
    ):
        if got.shape != want.shape:
            raise ValueError(f"state.{name} has shape {tuple(got.shape)}; this call needs {tuple(want.shape)}")
