"""Numbers that are known beforehand as tensors, made where they are used: for a copy from its memory the host waits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def constants(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A few numbers -> (n,)."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])
