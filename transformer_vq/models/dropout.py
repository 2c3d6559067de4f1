"""What is dropped while training: entries, anew in every call, and what lasts a whole sequence.

Which rows of a batch skip which blocks, and the mask on the sinusoids, stay the same through all calls that carry one
state, as in the paper's code. They follow from a number per row that the state carries, hashed with the place it is
needed at: nothing has to be kept, recomputation finds the same, and a stopped run goes on with the same masks.

In a loop that names the rows (`model.set_rows`, as ours does) all of it follows from (seed, step, row, place), whatever
the micro-batches and processes; elsewhere from one draw a call of torch's global generator. The mask on the sinusoids
is one for all rows of a forward pass, the first row's: rows that started in one step share it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transformer_vq.ops import counter

ROW_BITS = 21  # of a state's number: they tell the row, the others are common to the rows that start in one step


class RowDropout(nn.Dropout):
    """Dropout of entries that follows from names, see ops/counter.py: no cut of a batch changes what falls."""

    def forward(self, x: Tensor, states: Tensor | None = None) -> Tensor:
        """x (..., D), states (...) int64 -> the same shape and dtype; the identity in evaluation. None: torch's own."""
        if states is None or not self.training:
            return super().forward(x)
        return counter.drop(x, self.p, states)


class ResidualDropout(nn.Module):
    """Dropout of single entries, then of the whole update of an example; what survives is scaled to keep the mean."""

    def __init__(self, entries: float, skip: float, layer: int) -> None:
        """skip: chance that an example goes without the update.  layer: its index, for the masks."""
        super().__init__()
        self.entries = RowDropout(entries)
        self.skip, self.layer = skip, layer

    def forward(self, update: Tensor, draws: Tensor | None, tokens: Tensor | None = None, place: int = 0) -> Tensor:
        """update (B, T, D) -> the same shape and dtype; the identity in evaluation.

        draws (B,) int64, None in evaluation: see `lasting_uniform`.  tokens (B, T) int64: names of this step's tokens.
        place: among the updates of a layer.
        """
        if tokens is not None:
            tokens = counter.bits(tokens, tokens.new_full((), 1 + 2 * self.layer + place))
        update = self.entries(update, tokens)
        if not self.training or self.skip == 0:
            return update
        assert draws is not None
        keep = lasting_uniform(draws, self.layer, torch.full_like(draws, -1 - place)) >= self.skip
        return torch.where(keep[:, None, None], update / (1 - self.skip), 0)


def fresh_draws(seed: Tensor, rows: Tensor) -> Tensor:
    """The numbers, never 0, of rows (B,) of the step's batch that start in a step of this seed (): (B,) int64."""
    common = counter.mix(seed) & (2 ** (62 - ROW_BITS) - 1)
    draws: Tensor = (common << ROW_BITS) | (rows % (2**ROW_BITS - 1) + 1)
    return draws


def common_draw(draws: Tensor) -> Tensor:
    """() int64: what all rows that started in the step of the first one have in common."""
    return draws[0] >> ROW_BITS


def lasting_uniform(draws: Tensor, layer: int, place: Tensor) -> Tensor:
    """Numbers of 24 random bits in [0, 1), fp32, of the shape of draws + place, both int64: the same for the same.

    splitmix64 [Steele 2014, doi 10.1145/2660193.2660195, figure 14] of the draw, then of layer and place; integers
    wrap around.
    """
    x = counter.mix(counter.mix(draws + (layer + 1) * counter.GAMMA % 2**63) + place * counter.GAMMA)
    return ((x >> 40) & 0xFFFFFF).float() / 2**24
