"""A short causal convolution on what queries, keys and values are made of: each token sees the few before it.

    c_t = y_t + Σ_{d=0}^{w-1} W_d ⊙ y_{t-d},   tokens of the same document only        [H3 2212.14052; Arora 2312.04927]

A head can then match "what followed this before" within one layer; without it, that takes two layers that have found
each other, and copying is learned much later. The last w-1 inputs are carried from call to call.

Axes:  B batch  T length  D width  w taps
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transformer_vq.ops.attention.padding import real_first


class ShortConvolution(nn.Module):
    """Depthwise, causal, of w taps, beside the identity: with all weights at 0 it does nothing."""

    def __init__(self, width: int, taps: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = taps**-0.5  # as nn.Conv1d starts a depthwise kernel
        self.weight = nn.Parameter(torch.empty(width, 1, taps))
        """(D, 1, w), tap 0 the oldest, as nn.Conv1d has it; three axes, so that Muon does not take it for a matrix."""
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)

    @property
    def reach(self) -> int:
        """How many earlier tokens are seen, w-1."""
        return self.weight.shape[2] - 1

    def forward(self, y: Tensor, before: Tensor | None, places: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """y (B, T, D) -> the same shape, and the last w-1 inputs (B, w-1, D) to carry on, oldest first, detached.

        before (B, w-1, D): what an earlier call returned; None: nothing came before.  places (B, T) int64: of each real
        token in its document.  mask (B, T) bool, True = real; the others see and are seen by nothing.
        """
        B, T, D = y.shape
        if before is None:
            before = y.new_zeros(B, self.reach, D)
        if mask is None:
            seen = torch.cat([before.to(y.dtype), y], 1)
            return y + self._taps(seen, places), seen[:, T:].detach()
        order = real_first(mask)[..., None]  # padding at the end, where no real token sees it
        seen = torch.cat([before.to(y.dtype), y.take_along_dim(order, 1)], 1)
        mixed = self._taps(seen, places.take_along_dim(order[..., 0], 1)).take_along_dim(order.argsort(1), 1)
        last = mask.sum(1)[:, None] + torch.arange(self.reach, device=y.device)
        return y + mixed, seen.take_along_dim(last[..., None], 1).detach()

    def _taps(self, seen: Tensor, places: Tensor) -> Tensor:
        """Σ_d W_d ⊙ y_{t-d}: inputs (B, w-1+T, D) with those carried in front -> (B, T, D)."""
        total, T = torch.zeros_like(seen[:, self.reach :]), places.shape[1]
        for d, weight in enumerate(self.weight[:, 0].to(seen.dtype).flip(1).unbind(1)):
            first = self.reach - d
            earlier = seen[:, first : first + T]
            total = total + weight * (torch.where((places >= d)[..., None], earlier, 0) if d else earlier)
        return total
