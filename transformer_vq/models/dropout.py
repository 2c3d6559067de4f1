"""What is dropped while training: entries, anew in every call, and what lasts a whole sequence.

Which rows of a batch skip which blocks, and the mask on the sinusoids, stay the same through all calls that carry one
state, as in the paper's code. They follow from a number per row that the state carries, hashed with the place it is
needed at: nothing has to be kept, recomputation finds the same, and a stopped run goes on with the same masks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

GAMMA, FIRST, SECOND = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class ResidualDropout(nn.Module):
    """Dropout of single entries, then of the whole update of an example; what survives is scaled to keep the mean."""

    def __init__(self, entries: float, skip: float, layer: int) -> None:
        """skip: chance that an example goes without the update.  layer: its index, for the masks that last."""
        super().__init__()
        self.entries = nn.Dropout(entries)
        self.skip, self.layer = skip, layer

    def forward(self, update: Tensor, draws: Tensor | None, place: int = 0) -> Tensor:
        """update (B, T, D) -> the same shape and dtype; the identity in evaluation.

        draws (B,) int64, None in evaluation: see `lasting_uniform`.  place: among the updates of a layer.
        """
        update = self.entries(update)
        if not self.training or self.skip == 0:
            return update
        assert draws is not None
        keep = lasting_uniform(draws, self.layer, torch.full_like(draws, -1 - place)) >= self.skip
        return torch.where(keep[:, None, None], update / (1 - self.skip), 0)


def lasting_uniform(draws: Tensor, layer: int, place: Tensor) -> Tensor:
    """Numbers of 24 random bits in [0, 1), fp32, of the shape of draws + place, both int64: the same for the same.

    splitmix64 [Steele 2014, doi 10.1145/2660193.2660195, figure 14] of the draw, then of layer and place; integers
    wrap around.
    """
    x = _mix(_mix(draws + (layer + 1) * GAMMA % 2**63) + place * GAMMA)
    return ((x >> 40) & 0xFFFFFF).float() / 2**24


def _mix(x: Tensor) -> Tensor:
    """Bits of int64 numbers stirred, one to one."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * FIRST  # >> repeats the sign: what it shifts in is masked off
    x = (x ^ ((x >> 27) & (2**37 - 1))) * SECOND
    return x ^ ((x >> 31) & (2**33 - 1))
