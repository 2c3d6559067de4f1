"""The constant-size memory that VQ attention carries from one call to the next."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformer_vq.ops.attention.call import Call


class AttentionState(NamedTuple):
    """What is left of the tokens read so far. Hkv key heads, S codes, M window; detached, constant in T.

    The last M real keys of the current document stay exact (right-aligned, oldest first); all older ones are a count
    and a mean value per code.
    """

    codes: Tensor
    """(B, Hkv, M) int64."""
    k_hat: Tensor
    """(B, Hkv, M, K): quantized keys as they were when made, not looked up again."""
    v: Tensor
    """(B, Hkv, M, V)."""
    alive: Tensor
    """(B, M) bool: the slot holds a key that the next token may see."""
    count: Tensor  # type: ignore[assignment]
    """(B, Hkv, S) fp32 or wider: keys older than the window, per code."""
    mean: Tensor
    """(B, Hkv, S, V) fp32 or wider: their mean value; 0 for an empty code."""
    segment: Tensor
    """(B,) int64: id of the last real token's segment."""
    position: Tensor
    """(B,) int64: real tokens read so far in this stream; at 0 `segment` means nothing."""


def pick(x: Tensor, order: Tensor) -> Tensor:
    """x (B or 1, H, T, D) with its tokens in `order` (B, N) -> (B, H, N, D)."""
    return torch.take_along_dim(x, order[:, None, :, None], dim=2)


def initial_state(
    B: int, Hkv: int, K: int, V: int, S: int, M: int, dtype: torch.dtype, device: torch.device | str
) -> AttentionState:
    """The state before the first token. `dtype` is that of keys and values; counts and means are fp32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    return AttentionState(
        codes=torch.zeros(B, Hkv, M, dtype=torch.int64, device=device),
        k_hat=torch.zeros(B, Hkv, M, K, dtype=dtype, device=device),
        v=torch.zeros(B, Hkv, M, V, dtype=dtype, device=device),
        alive=torch.zeros(B, M, dtype=torch.bool, device=device),
        count=torch.zeros(B, Hkv, S, dtype=wide, device=device),
        mean=torch.zeros(B, Hkv, S, V, dtype=wide, device=device),
        segment=torch.zeros(B, dtype=torch.int64, device=device),
        position=torch.zeros(B, dtype=torch.int64, device=device),
    )


@torch.no_grad()
def next_state(call: Call, k_dtype: torch.dtype, v_dtype: torch.dtype) -> AttentionState:
    """What is left after the tokens of `call`, O(T): the last M keys, and the older ones folded into counts and means.

    Places: carried keys stand at 0 … M−1, key t of the call at M+t; the M places before `M + length` stay exact.
    """
    old, length, M, T = call.state, call.length, call.window, call.v.shape[2]
    S = old.count.shape[2]
    if T == 0:
        return old._replace(k_hat=old.k_hat.to(k_dtype), v=old.v.to(v_dtype))
    old_run, new_run = call.key_run.split([M, T], dim=1)
    last_run = torch.where(length > 0, new_run.gather(1, (length - 1).clamp_min(0)[:, None])[:, 0], 0)

    place = length[:, None] + torch.arange(M, device=length.device)
    carried, index_old, index_new = place < M, place.clamp_max(M - 1), (place - M).clamp_min(0)

    def keep(old: Tensor, new: Tensor) -> Tensor:
        """(B, Hkv, M | T, D) -> (B, Hkv, M, D), 0 where the slot belongs to an earlier document or to none."""
        if call.padded:
            kept = torch.where(carried[:, None, :, None], pick(old, index_old), pick(new, index_new))
        else:
            kept = torch.cat([old[:, :, T:], new[:, :, max(T - M, 0) :]], dim=2)
        return kept.masked_fill(~alive[:, None, :, None], 0)

    alive = torch.where(carried, old_run.gather(1, index_old), new_run.gather(1, index_new)) == last_run[:, None]

    same = (last_run == 0)[:, None, None]
    count, mean = old.count * same, old.mean * same[..., None]
    leaving = [(old.codes[:, :, :T], old.v[:, :, :T], old_run[:, :T], 0)]
    if T > M:
        leaving.append((call.codes[:, :, : T - M], call.v[:, :, : T - M], new_run[:, : T - M], M))
    total, added = torch.zeros_like(mean), torch.zeros_like(count)
    for codes, v, run, first in leaving:
        at = first + torch.arange(codes.shape[2], device=length.device)
        gone = (run == last_run[:, None]) & (at < length[:, None])
        c, s = sum_by_code(codes.masked_fill(~gone[:, None], S), v, S)
        added, total = added + c, total + s
    after = (count + added).clamp_min(1)
    return AttentionState(
        codes=keep(old.codes[..., None], call.codes[..., None])[..., 0],
        k_hat=keep(old.k_hat, call.k_hat).to(k_dtype),
        v=keep(old.v, call.v).to(v_dtype),
        alive=alive,
        count=count + added,
        mean=(count / after)[..., None] * mean + total / after[..., None],
        segment=old.segment if call.segment is None else torch.where(length > 0, call.segment[:, -1], old.segment),
        position=old.position + length,
    )


def sum_by_code(codes: Tensor, v: Tensor, S: int) -> tuple[Tensor, Tensor]:
    """Count and summed value of each code: codes (..., T), v (..., T, V) -> (..., S), (..., S, V). Code S: left out."""
    *outer, T, V = v.shape
    lists = math.prod(outer)
    row = codes.reshape(lists, T) + torch.arange(lists, device=codes.device)[:, None] * (S + 1)
    count = v.new_zeros(lists * (S + 1)).index_add_(0, row.flatten(), v.new_ones(row.numel()))
    total = v.new_zeros(lists * (S + 1), V).index_add_(0, row.flatten(), v.reshape(lists * T, V))
    return count.view(*outer, S + 1)[..., :S], total.view(*outer, S + 1, V)[..., :S, :]
