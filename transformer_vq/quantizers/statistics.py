"""Sums of keys per code, collected over the micro-batches and processes of one optimizer step.

The tensors are plain attributes, not buffers: DistributedDataParallel overwrites buffers with those of process 0.

Axes:  B batch  H heads  T length  K key width  S codes
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def recomputing() -> bool:
    """True inside a backward pass: activation checkpointing runs forward passes there for a second time."""
    return torch._C._current_graph_task_id() != -1


class Statistics:
    """Per code the sum of its keys (H, S, K) and their number (H, S), detached, fp32 or wider."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count: Tensor | None = None

    @torch.no_grad()
    def collect(self, k: Tensor, codes: Tensor, counts: Tensor, mask: Tensor | None, dtype: torch.dtype) -> None:
        """Add keys k (B, H, T, K), the unquantized ones, with their codes (B, H, T) and counts (H, S).

        Padding is left out; so is a forward pass that activation checkpointing repeats.
        """
        if recomputing():
            return
        H, S = counts.shape
        if self._sum is None or self._count is None:
            self._sum = torch.zeros(H, S, k.shape[-1], dtype=dtype, device=k.device)
            self._count = torch.zeros(H, S, dtype=dtype, device=k.device)
        keys = k.to(dtype)
        if mask is not None:
            keys = keys.masked_fill(~mask[:, None, :, None], 0.0)
        for h in range(H):
            self._sum[h].index_add_(0, codes[:, h].reshape(-1), keys[:, h].reshape(-1, k.shape[-1]))
        self._count += counts

    def pending(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(sum, count) of this process so far, zeros when nothing was collected; `like` is (H, S, K)."""
        if self._sum is None or self._count is None:
            return torch.zeros_like(like), torch.zeros_like(like[..., 0])
        return self._sum.to(like), self._count.to(like)

    def discard(self) -> None:
        """Forget everything collected."""
        self._sum = self._count = None


def add_over_processes(*tensors: Tensor) -> None:
    """Sum each tensor over all processes, in place. Every process must call it, even with zeros."""
    if distributed.is_available() and distributed.is_initialized():
        for tensor in tensors:
            distributed.all_reduce(tensor)


def take_from_first_process(*tensors: Tensor) -> None:
    """Overwrite each tensor with that of process 0, in place. Every process must call it."""
    if distributed.is_available() and distributed.is_initialized():
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)
