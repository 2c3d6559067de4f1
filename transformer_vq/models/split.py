"""Rows cut into pieces, one a process: what each layer hears from the pieces before its own, with gradient.

Who carries it is a `Line` of processes (training/context.py); here is what is carried. A process sums its own piece up,
hears what came before, passes on what comes after, and goes on as with a state.

Axes:  B batch  T length of a piece  D width  M window
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from transformer_vq.models.place import locate
from transformer_vq.ops.attention.arguments import Arguments
from transformer_vq.ops.attention.padding import real_first
from transformer_vq.ops.attention.split import Summary, follow, summary
from transformer_vq.ops.attention.state import LEARNED, AttentionState, initial_state

Follow = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]
"""What came before a piece, what the piece leaves behind by itself -> what came before the next one."""


class Line(Protocol):
    """The processes that share rows, in the order of their pieces. All must call the same, in the same order."""

    @property
    def first(self) -> bool:
        """This process has the first pieces."""

    @property
    def closes(self) -> bool:
        """What the last piece leaves behind is what the first one of the next call goes on from."""

    def pass_on(
        self, anchor: Tensor, start: Sequence[Tensor], own: Sequence[Tensor], follow: Follow, learned: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """What came before this process's piece, in the shapes and types of `start`, which the first one begins with.

        learned: which of these carry gradient, to `own` and to all pieces before. The first returned is `anchor`
        itself: what it is used for makes every process take part in the backward pass.
        """

    def to_first(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The last process's tensors on the first one; all others get back their own."""


def attention_before(line: Line, x: Arguments) -> Arguments:
    """The arguments of a piece's attention, with the state that it goes on from. x.state: what the rows begin with."""
    piece = summary(x)
    own = piece.state
    start = initial_state(*sizes(own), dtype=own.k_hat.dtype, device=own.codes.device) if x.state is None else x.state
    start = start.detach().of_type(own.k_hat.dtype, own.v.dtype, own.count.dtype)
    silent = x.gradients == "block" and not x.grad_through_cache  # the paper's gradient then ends with the block
    names = () if silent else LEARNED if x.grad_through_cache and x.cache else LEARNED[:2]
    learned = [AttentionState._fields.index(name) for name in names]

    def after(before: Sequence[Tensor], own: Sequence[Tensor]) -> Sequence[Tensor]:
        *state, unbroken = own
        return follow(AttentionState(*before), Summary(AttentionState(*state), unbroken, piece.named))

    v, before = line.pass_on(x.v, start, [*own, piece.unbroken], after, learned)
    if line.first:
        return replace(x, v=v)
    return replace(x, v=v, state=AttentionState(*before), linked=torch.is_grad_enabled())


def sizes(state: AttentionState) -> tuple[int, int, int, int, int, int]:
    """B, Hkv, K, V, S, M."""
    (B, Hkv, M, K), (_, _, S, V) = state.k_hat.shape, state.mean.shape
    return B, Hkv, K, V, S, M


def inputs_before(
    line: Line, y: Tensor, reach: int, before: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y (B, T, D), inputs of a short convolution that sees `reach` of them -> y, and those before it (B, reach, D)."""
    B, T, D = y.shape
    empty = y.new_zeros(B, reach, D)
    real = torch.full((B,), T, device=y.device) if mask is None else mask.sum(1)
    y_first = y if mask is None else y.take_along_dim(real_first(mask)[..., None], 1)
    last = real[:, None] + torch.arange(reach, device=y.device)
    own = torch.cat([empty, y_first], 1).take_along_dim(last[..., None], 1)

    def after(before: Sequence[Tensor], own: Sequence[Tensor]) -> Sequence[Tensor]:
        slot = torch.arange(reach, device=y.device) + own[1][:, None]
        shifted = before[0].take_along_dim(slot.clamp_max(reach - 1)[..., None], 1)
        return [torch.where((slot < reach)[..., None], shifted, own[0])]

    start = empty if before is None else before.to(y.dtype)
    y, (found,) = line.pass_on(y, [start], [own, real], after, [0])
    return y, found


def place_before(
    line: Line, start: tuple[Tensor, Tensor], shape: torch.Size, segments: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Position and segment (B,) that a piece of tokens (B, T) goes on from; see `locate`. start: those of the rows."""
    nothing = torch.zeros_like(start[0])
    _, *own = locate(shape, (nothing, nothing), segments, mask)
    real = torch.full_like(nothing, shape[1]) if mask is None else mask.sum(1)

    def after(before: Sequence[Tensor], own: Sequence[Tensor]) -> Sequence[Tensor]:
        (position, segment), (own_position, own_segment, real) = before, own
        if segments is None:
            return [position + own_position, segment]
        goes_on = (own_position == real) & ((own_segment == segment) | (position == 0))
        behind = torch.where(goes_on, position, 0) + own_position
        return [torch.where(real > 0, behind, position), torch.where(real > 0, own_segment, segment)]

    _, (position, segment) = line.pass_on(real, start, [*own, real], after, [])
    return position, segment
