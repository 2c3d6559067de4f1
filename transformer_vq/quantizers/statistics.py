"""What one optimizer step's keys tell the codebook: sums per code, and a few keys to replace dead codes with.

Collected over micro-batches, added over processes, applied once. The tensors are plain attributes, not buffers:
DistributedDataParallel overwrites buffers with those of process 0.

Axes:  B batch  H heads  T length  K key width  S codes
"""

from __future__ import annotations

import torch
from torch import Tensor

from transformer_vq.ops.estimators.noise import Noise
from transformer_vq.ops.sums import add_rows
from transformer_vq.quantizers.reservoir import Reservoir


def recomputing() -> bool:
    """True inside a backward pass: activation checkpointing runs forward passes there for a second time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Statistics:
    """Per code the sum of its keys (H, S, K) and their number (H, S), detached, fp32 or wider.

    sums: False for a codebook that is learned by gradient. candidates: how many keys a forward pass leaves.
    """

    def __init__(self, *, sums: bool, candidates: int) -> None:
        self._with_sums, self._candidates_wanted = sums, candidates
        self.discard()

    def discard(self) -> None:
        """Forget everything collected."""
        self._sum: Tensor | None = None
        self._count: Tensor | None = None
        self._candidates = Reservoir(self._candidates_wanted)

    @torch.no_grad()
    def collect(self, k: Tensor, codes: Tensor, counts: Tensor, mask: Tensor | None, names: Noise | None) -> None:
        """Add keys k (B, H, T, K), the unquantized ones, with their codes (B, H, T) and counts (H, S).

        names: of the keys, where candidates are wanted. Padding is left out; so is a forward pass that activation
        checkpointing repeats.
        """
        if recomputing():
            return
        dtype = torch.promote_types(k.dtype, torch.float32)
        self._count = counts.to(dtype) if self._count is None else self._count + counts
        if self._with_sums:
            total = key_sums(k, codes, counts.shape[1], mask)
            self._sum = total if self._sum is None else self._sum.add_(total)
        if names is not None:
            self._candidates.add(k, mask, names)

    def pending(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(sum, count) of this process so far, zeros when nothing was collected; `like` is (H, S, K)."""
        total = torch.zeros_like(like) if self._sum is None else self._sum.to(like)
        count = torch.zeros_like(like[..., 0]) if self._count is None else self._count.to(like)
        return total, count

    def candidates(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys to replace dead codes with, the same on every process: (H, S, K), of which the first n, () int64, count.

        Those of the step that a hash puts first, in its order: a batch may be cut at will. Every process must call it.
        """
        pool, n = self._candidates.ranked(like[None])
        rows = torch.zeros_like(like)
        rows[:, : pool.shape[1]] = pool.to(like.dtype)
        return rows, n


def key_sums(k: Tensor, codes: Tensor, size: int, mask: Tensor | None) -> Tensor:
    """Σ of the keys of each code: k (B, H, T, K), codes (B, H, T) -> (H, S, K), fp32 or wider; padding left out."""
    H, K = k.shape[1], k.shape[3]
    padding = size  # one more row a head takes what does not count: no masked copy of the keys
    index = codes if mask is None else torch.where(mask[:, None], codes, padding)
    index = index + torch.arange(H, device=k.device)[:, None] * (size + 1)
    if not k.is_contiguous():  # most likely (B, T, H, K) transposed: then this order needs no copy
        k, index = k.transpose(1, 2), index.transpose(1, 2)
    dtype = torch.promote_types(k.dtype, torch.float32)
    total = torch.zeros(H * (size + 1), K, dtype=dtype, device=k.device)
    add_rows(total, index.reshape(-1), k.reshape(-1, K).to(dtype))
    return total.view(H, size + 1, K)[:, :size].contiguous()
