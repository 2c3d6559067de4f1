"""What quantizers do over the processes that train together; alone, nothing.

Axes:  H heads  K key width
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from transformer_vq.clock import spent


def is_distributed() -> bool:
    """True when several processes train together."""
    return distributed.is_available() and distributed.is_initialized()


def is_first_process() -> bool:
    """True on process 0, and when there is only one."""
    return not is_distributed() or distributed.get_rank() == 0


def add_over_processes(*tensors: Tensor) -> None:
    """Sum each tensor over all processes, in place. Every process must call it, even with zeros."""
    if is_distributed():
        with spent("communication"):
            for tensor in tensors:
                distributed.all_reduce(tensor)


def join_processes(keys: Tensor) -> Tensor:
    """Keys (H, n, K) of all processes one after another, (H, Σn, K); n may differ. Every process must call it."""
    if not is_distributed():
        return keys
    processes, mine = distributed.get_world_size(), torch.tensor(keys.shape[1], device=keys.device)
    sizes = [torch.empty_like(mine) for _ in range(processes)]
    distributed.all_gather(sizes, mine)
    padded = keys.new_zeros(keys.shape[0], int(torch.stack(sizes).max()), keys.shape[2])
    padded[:, : keys.shape[1]] = keys
    parts = [torch.empty_like(padded) for _ in range(processes)]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:, : int(n)] for part, n in zip(parts, sizes, strict=True)], 1)


def take_from_first_process(*tensors: Tensor) -> None:
    """Overwrite each tensor with that of process 0, in place. Every process must call it."""
    if is_distributed():
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)
