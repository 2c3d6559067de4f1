"""What a language model carries between calls: one state a layer, and where each row stands in its document.

All tensors have the batch as their first axis; all are detached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from transformer_vq.models.attention import Carried, LayerState
from transformer_vq.ops.attention.full import FullState, trim


class ModelState(NamedTuple):
    """State of B rows.  Constant in the tokens read, except for layers with full attention."""

    layers: tuple[LayerState, ...]
    position: Tensor
    """(B,) int64: real tokens read of the current document; without segments, of the stream. 0: nothing read."""
    segment: Tensor
    """(B,) int64: id of the last real token's segment; means nothing where `position` is 0."""
    draws: Tensor
    """(B,) int64: what the dropout that lasts a sequence follows from; 0: nothing drawn yet."""
    inputs: tuple[Tensor, ...] = ()
    """One a layer, (B, conv-1, D): the last inputs of its short convolution; empty without one."""

    def of_layer(self, i: int) -> Carried:
        """What layer i carries."""
        return Carried(self.layers[i], self.inputs[i] if self.inputs else None)

    def reset_rows(self, fresh: Tensor) -> ModelState:
        """The rows where fresh (B,) bool is True start anew, as with `state=None`; the others go on.

        Full attention drops the keys that no row sees any more, or a stream of many sequences would keep them all.
        """
        reset = self._map(lambda x: x.masked_fill(fresh.to(x.device).view(-1, *[1] * (x.ndim - 1)), 0))
        layers = tuple(trim(layer) if isinstance(layer, FullState) else layer for layer in reset.layers)
        return reset._replace(layers=layers)

    def select_rows(self, rows: Tensor) -> ModelState:
        """Rows by index (N,) int64, in that order; an index may repeat, as beams and several samples a prompt need."""
        return self._map(lambda x: x.index_select(0, rows.to(x.device)))

    def _map(self, change: Callable[[Tensor], Tensor]) -> ModelState:
        """`change` applied to every tensor."""
        layers = tuple(type(layer)(*map(change, layer)) for layer in self.layers)
        inputs = tuple(map(change, self.inputs))
        return ModelState(layers, change(self.position), change(self.segment), change(self.draws), inputs)


def locate(
    shape: torch.Size, before: tuple[Tensor, Tensor], segments: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Where tokens stand in their documents: positions (B, T), then the position and segment (B,) to carry on.

    shape (B, T); before: position and segment of the state; segments, mask (B, T) as in `vq_attention`. Only real
    tokens count; a real token whose segment differs from the last real token's is at 0.
    Positions of padding mean nothing.
    """
    position, segment = before
    B, T = shape
    real = torch.ones(B, T, dtype=torch.bool, device=position.device) if mask is None else mask
    index = real.cumsum(1) - 1  # of each token among the call's real ones
    positions = position[:, None] + index
    if segments is not None:
        steps = torch.arange(T, device=position.device)
        last = torch.where(real, steps, -1).cummax(1).values  # the last real token up to here, -1: none in this call
        earlier = torch.cat([last.new_full((B, 1), -1), last[:, :-1]], 1)
        known = (earlier >= 0) | (position > 0)[:, None]
        previous = torch.where(earlier >= 0, segments.gather(1, earlier.clamp_min(0)), segment[:, None])
        start = torch.where(real & known & (segments != previous), index, -1).cummax(1).values
        positions = torch.where(start >= 0, index - start, positions)
        segment = torch.where(last[:, -1] >= 0, segments.gather(1, last[:, -1:].clamp_min(0))[:, 0], segment)
    # padding after the last real token has that token's index, so the last column speaks for it
    return positions, positions[:, -1] + 1, segment
