"""What is dropped from the residual stream while training: entries, and whole updates of an example.

The paper keeps one layer-drop mask for all blocks and update windows of a sequence; here a mask lasts one call, and
with carried state each call draws anew.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResidualDropout(nn.Module):
    """Dropout of single entries, then of the whole update of an example; what survives is scaled to keep the mean."""

    def __init__(self, entries: float, layer: float) -> None:
        super().__init__()
        self.entries = nn.Dropout(entries)
        self.layer = layer

    def forward(self, update: Tensor) -> Tensor:
        """update (B, T, D) -> the same shape and dtype; the identity in evaluation."""
        update = self.entries(update)
        if not self.training or self.layer == 0:
            return update
        keep = torch.rand(update.shape[0], 1, 1, device=update.device) >= self.layer
        return torch.where(keep, update / (1 - self.layer), 0)
