"""Where tokens stand in their documents.

Axes:  B batch  T length
"""

from __future__ import annotations

import torch
from torch import Tensor


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
