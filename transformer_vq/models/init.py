"""Fresh weights that depend on a generator alone, never on the global random state."""

from __future__ import annotations

import torch
from torch import nn


def linear(inputs: int, outputs: int, generator: torch.Generator, bias: bool = False) -> nn.Linear:
    """A linear map with untruncated normal weights of standard deviation inputs^(-1/2) and zero bias."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, device=torch.get_default_device())
    nn.init.normal_(layer.weight, std=inputs**-0.5, generator=generator)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def embedding(rows: int, width: int, generator: torch.Generator) -> nn.Embedding:
    """An embedding with normal weights of standard deviation 1."""
    layer: nn.Embedding = nn.utils.skip_init(nn.Embedding, rows, width, device=torch.get_default_device())
    nn.init.normal_(layer.weight, generator=generator)
    return layer
