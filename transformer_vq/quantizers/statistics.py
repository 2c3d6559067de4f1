"""What one optimizer step's keys tell the codebook: sums per code, and a few keys to replace dead codes with.

Collected over micro-batches, added over processes, applied once. The tensors are plain attributes, not buffers:
DistributedDataParallel overwrites buffers with those of process 0.

Axes:  B batch  H heads  T length  K key width  S codes
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed


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
        self._candidates: list[Tensor] = []

    @torch.no_grad()
    def collect(self, k: Tensor, codes: Tensor, counts: Tensor, mask: Tensor | None, seed: Tensor) -> None:
        """Add keys k (B, H, T, K), the unquantized ones, with their codes (B, H, T) and counts (H, S).

        seed () int64, on the CPU: what the choice of candidates follows from.

        Padding is left out; so is a forward pass that activation checkpointing repeats.
        """
        if recomputing():
            return
        dtype = torch.promote_types(k.dtype, torch.float32)
        self._count = counts.to(dtype) if self._count is None else self._count + counts
        if self._with_sums:
            total = key_sums(k, codes, counts.shape[1], mask)
            self._sum = total if self._sum is None else self._sum.add_(total)
        if self._candidates_wanted:
            self._candidates.append(some_keys(k.detach(), mask, self._candidates_wanted, seed).to(dtype))

    def pending(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(sum, count) of this process so far, zeros when nothing was collected; `like` is (H, S, K)."""
        total = torch.zeros_like(like) if self._sum is None else self._sum.to(like)
        count = torch.zeros_like(like[..., 0]) if self._count is None else self._count.to(like)
        return total, count

    def candidates(self, like: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Keys to replace dead codes with, the same on every process: (H, S, K), of which the first n, () int64, count.

        They are drawn without repetition from those of all processes, in the order of the processes.
        """
        pool = torch.cat([like[:, :0], *self._candidates], 1).to(like.dtype)
        pool = join_processes(pool)
        chosen = torch.randperm(pool.shape[1], generator=generator)[: like.shape[1]].to(pool.device)
        rows = torch.zeros_like(like)
        rows[:, : len(chosen)] = pool[:, chosen]
        return rows, torch.tensor(len(chosen), device=like.device)


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
    return (
        total.index_add_(0, index.reshape(-1), k.reshape(-1, K).to(dtype)).view(H, size + 1, K)[:, :size].contiguous()
    )


def real_keys(k: Tensor, mask: Tensor | None) -> Tensor:
    """Keys at real tokens, (B, H, T, K) -> (H, N, K)."""
    keys = k.detach().transpose(0, 1).flatten(1, 2)
    return keys if mask is None else keys[:, mask.flatten()]


@torch.library.custom_op("transformer_vq::some_keys", mutates_args=())
def some_keys(k: Tensor, mask: Tensor | None, wanted: int, seed: Tensor) -> Tensor:
    """At most `wanted` keys at real tokens, without repetition: (B, H, T, K) -> (H, n, K). Opaque to the compiler."""
    keys = real_keys(k, mask)
    generator = torch.Generator().manual_seed(int(seed))
    chosen = torch.randperm(keys.shape[1], generator=generator)[:wanted]
    return keys[:, chosen.to(k.device)]


@some_keys.register_fake
def _(k: Tensor, mask: Tensor | None, wanted: int, seed: Tensor) -> Tensor:
    n = min(wanted, k.shape[0] * k.shape[2]) if mask is None else torch.library.get_ctx().new_dynamic_size()
    return k.new_empty(k.shape[1], n, k.shape[3])


def is_distributed() -> bool:
    """True when several processes train together."""
    return distributed.is_available() and distributed.is_initialized()


def is_first_process() -> bool:
    """True on process 0, and when there is only one."""
    return not is_distributed() or distributed.get_rank() == 0


def add_over_processes(*tensors: Tensor) -> None:
    """Sum each tensor over all processes, in place. Every process must call it, even with zeros."""
    if is_distributed():
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
