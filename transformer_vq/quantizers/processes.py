"""What quantizers do over the processes that train together; alone, nothing.

Axes:  H heads  K key width  N processes
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


def most_over_processes(n: int, device: torch.device) -> int:
    """The largest n of all processes, read by the host. Every process must call it."""
    if not is_distributed():
        return n
    most = torch.full((), n, device=device)
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    return int(most)


def join_processes(keys: Tensor) -> Tensor:
    """Keys (H, n, K) of all processes one after another, (H, N·n, K). Every process must call it, with the same n:
    sizes that differ would have to be read by the host.
    """
    if not is_distributed():
        return keys
    H, n, K = keys.shape
    parts = keys.new_empty(distributed.get_world_size() * H, n, K)
    distributed.all_gather_into_tensor(parts, keys.contiguous())
    joined: Tensor = parts.unflatten(0, (-1, H)).transpose(0, 1).flatten(1, 2)
    return joined


def take_from_first_process(*tensors: Tensor) -> None:
    """Overwrite each tensor with that of process 0, in place. Every process must call it."""
    if is_distributed():
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)
