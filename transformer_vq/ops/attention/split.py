"""One sequence in pieces: what a piece leaves to those after it, found apart and put together.

A piece needs of all before it what a state holds: one window of keys and values, and per code a count and a mean value.
Each piece sums itself up as if nothing came before (`summary`); `follow` puts a summary behind a state. So all pieces
are summed up at once, and only small things pass from piece to piece, S·(V+1) + M·(K+V) numbers however long they are:

    state of piece p+1 = follow(state of piece p, summary(piece p))

Both are differentiable in keys, values and means: `vq_attention(..., state=..., linked=True)` is then the call on the
whole sequence, outputs and gradients, under either gradient rule. Blocks of the rule `block` must start at the same
tokens: pieces are multiples of L, and padding is behind all real tokens.

Axes:  B batch  Hkv key heads  K, V widths  S codes  M window
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from transformer_vq.ops.attention.arguments import Arguments
from transformer_vq.ops.attention.call import prepare
from transformer_vq.ops.attention.carry import next_state
from transformer_vq.ops.attention.padding import pick
from transformer_vq.ops.attention.state import AttentionState, sum_by_code


class Summary(NamedTuple):
    """What a piece leaves behind if nothing came before it."""

    state: AttentionState
    unbroken: Tensor
    """(B,) bool: all its real tokens are of one document."""
    named: bool
    """Documents have names: False where there were no segments, and the piece goes on with that before it."""


def summary(arguments: Arguments) -> Summary:
    """The arguments of a piece's `vq_attention`, queries and bias unread; their state is left out.

    Its means and window carry gradient to v and k_hat; without `grad_through_cache` the means carry none.
    """
    x = replace(arguments, q=arguments.q.detach(), bias=None, state=None, linked=False)
    with torch.autocast(x.q.device.type, enabled=False):
        call = prepare(x)
        state = next_state(call)
    if not x.grad_through_cache:
        state = state._replace(mean=state.mean.detach())
    unbroken = torch.ones_like(state.position, dtype=torch.bool) if call.run is None else call.run[:, -1] == 0
    return Summary(state, unbroken, x.segments is not None)


def follow(before: AttentionState, piece: Summary) -> AttentionState:
    """The state behind a piece, from the state before it: associative, O(M + S) a head.

    The windows lie as M slots of `before`, then M of the piece; the last M real ones stay exact.
    """
    own, M = piece.state, before.alive.shape[1]
    empty = own.position == 0
    goes_on = empty | piece.unbroken & (own.segment == before.segment) if piece.named else torch.ones_like(empty)
    alive = before.alive & goes_on[:, None]
    count = before.count * goes_on[:, None, None]

    fresh = own.alive.sum(1)[:, None]  # so many slots of the piece, at its right end, and as many leave `before`
    slot = torch.arange(M, device=alive.device)
    stays, shifted = slot + fresh < M, (slot + fresh).clamp_max(M - 1)

    def window(old: Tensor, new: Tensor) -> Tensor:
        """(B, Hkv, M, D) twice -> the same."""
        return torch.where(stays[:, None, :, None], pick(old, shifted), new)

    still = torch.where(stays, alive.gather(1, shifted), own.alive) if M else alive
    kept = still[:, None, :, None]
    S = count.shape[2]
    leaves = (slot < fresh) & alive
    entered, total = sum_by_code(before.codes.masked_fill(~leaves[:, None], S), before.v.to(count.dtype), S)
    after = count + entered + own.count
    share = 1 / after.clamp_min(1)[..., None]
    return AttentionState(
        codes=window(before.codes[..., None], own.codes[..., None])[..., 0] * still[:, None],
        k_hat=window(before.k_hat, own.k_hat).masked_fill(~kept, 0),
        v=window(before.v, own.v).masked_fill(~kept, 0),
        alive=still,
        count=after,
        mean=(count[..., None] * share) * before.mean + total * share + (own.count[..., None] * share) * own.mean,
        segment=torch.where(empty, before.segment, own.segment) if piece.named else before.segment,
        position=before.position + own.position,
    )
