"""Numbers that are known beforehand as tensors, made where they are used: for a copy from its memory the host waits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


def constants(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A few numbers -> (n,)."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])


def lasting_constants(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """More numbers, (n,), made once for a device, where each costs a launch. The tensor is shared: nobody writes to it.

    Made anew where it must not outlive the call: for the compiler, under a mode (a fake tensor has no numbers), and
    while a CUDA graph is captured, whose memory holds nothing until it is replayed.
    """
    passing = torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None
    if passing or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return constants(values, dtype, device)
    return _made_once(tuple(values), dtype, device)


@lru_cache(maxsize=64)
def _made_once(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor made under it could never take part in a backward pass
        return constants(values, dtype, device)
