"""From the state before a call and the call's tokens to the state after it.

Axes:  B batch  Hkv key heads  T length  K, V widths  S codes  M window
"""

from __future__ import annotations

import torch
from torch import Tensor

from transformer_vq.ops.attention.call import Call
from transformer_vq.ops.attention.padding import pick
from transformer_vq.ops.attention.state import AttentionState
from transformer_vq.ops.sums import add_rows


def next_state(call: Call) -> AttentionState:
    """What is left after the tokens of `call`, O(T): the last M keys, and the older ones folded into counts and means.

    Places: carried keys stand at 0 … M−1, key t of the call at M+t; the M places before `M + length` stay exact.
    """
    old, length, M, T = call.state, call.length, call.window, call.v.shape[2]
    S = old.count.shape[2]
    if T == 0:
        return old
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

    leaving = [] if call.fresh else [(old.codes[:, :, :T], old.v[:, :, :T], old_run[:, :T], 0)]
    if T > M:
        leaving.append((call.codes[:, :, : T - M], call.v[:, :, : T - M], new_run[:, : T - M], M))
    gone = []
    for codes, v, run, first in leaving:
        at = first + torch.arange(codes.shape[2], device=length.device)
        gone.append((codes, v.to(old.mean.dtype), ((run == last_run[:, None]) & (at < length[:, None]))[:, None]))

    before = old.count * (last_run == 0)[:, None, None]
    count = before.clone(memory_format=torch.contiguous_format)
    for codes, _, there in gone:
        count.view(-1).index_add_(0, rows_of(codes, S), there.to(count.dtype).expand_as(codes).flatten())
    weight = 1 / count.clamp_min(1)
    mean = torch.zeros_like(old.mean) if call.fresh else (old.mean * (before * weight)[..., None]).contiguous()
    for codes, v, there in gone:  # already divided: what no key is in is never touched, most of it in a short text
        share = torch.where(there, weight.gather(2, codes), 0)[..., None]
        add_rows(mean.view(-1, mean.shape[3]), rows_of(codes, S), torch.where(share > 0, v * share, 0).flatten(0, 2))
    return AttentionState(
        codes=keep(old.codes[..., None], call.codes[..., None])[..., 0],
        k_hat=keep(old.k_hat, call.k_hat),
        v=keep(old.v, call.v),
        alive=alive,
        count=count,
        mean=mean,
        segment=old.segment if call.segments is None else torch.where(length > 0, call.segments[:, -1], old.segment),
        position=old.position + length,
    )


def rows_of(codes: Tensor, S: int) -> Tensor:
    """Codes (B, Hkv, n) -> the place of each in (B·Hkv·S), flat."""
    lists = codes.shape[0] * codes.shape[1]
    return (codes.flatten(0, 1) + torch.arange(lists, device=codes.device)[:, None] * S).flatten()
