"""A sample of the keys of a step that does not depend on how its batch is cut: those that a hash puts first.

Every micro-batch and process keeps its own n keys of least hash of (seed, layer, step, row, place); the least of all
of them are the least of the whole batch. So memory is n keys a head, whatever the batch.

Axes:  B batch  H heads  T length  K key width  n at most `size` keys
"""

from __future__ import annotations

import torch
from torch import Tensor

from transformer_vq.ops import counter
from transformer_vq.ops.estimators.noise import Noise
from transformer_vq.quantizers.processes import join_processes

PADDING = 2**63 - 1
ENTRY = -1  # estimators count their entries from 0 on


class Reservoir:
    """At most `size` keys (H, n, K), in the order of their hashes, detached, fp32 or wider."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._hashes: Tensor | None = None
        self._keys: Tensor | None = None

    @torch.no_grad()
    def add(self, k: Tensor, mask: Tensor | None, names: Noise) -> None:
        """Consider the keys (B, H, T, K) at real tokens, whose names are (B, T)."""
        if not self.size:
            return
        hashes = counter.bits(names.tokens, names.tokens.new_full((), ENTRY))
        hashes = (hashes if mask is None else hashes.masked_fill(~mask, PADDING)).flatten()
        chosen = hashes.argsort(stable=True)[: self.size]
        keys = k.detach().transpose(0, 1).flatten(1, 2)[:, chosen].to(torch.promote_types(k.dtype, torch.float32))
        self._merge(keys, hashes[chosen])

    def keys(self, like: Tensor) -> Tensor:
        """What was kept so far, (H, n, K) on the device of keys `like` (B, H, T, K), padding left out."""
        if self._keys is None or self._hashes is None:
            return like.detach().transpose(0, 1).flatten(1, 2)[:, :0]
        return self._keys[:, self._hashes != PADDING]

    def join(self, like: Tensor | None = None) -> Tensor:
        """(H, n, K) of all processes, the same on each. Every process must call it; like: one that kept nothing."""
        keys, n = self.ranked(like)
        return keys[:, : int(n)]

    def ranked(self, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The same with padding behind, (H, at most size, K), and n, () int64: the host reads where processes join."""
        if self._keys is None or self._hashes is None:
            assert like is not None
            empty = torch.promote_types(like.dtype, torch.float32)
            self._keys = torch.zeros(like.shape[1], 0, like.shape[3], dtype=empty, device=like.device)
            self._hashes = torch.zeros(0, dtype=torch.int64, device=like.device)
        keys, hashes = join_processes(self._keys), join_processes(self._hashes[None, :, None])[0, :, 0]
        self._keys, self._hashes = self._least(keys, hashes)
        return self._keys, (self._hashes != PADDING).sum()

    def _merge(self, keys: Tensor, hashes: Tensor) -> None:
        if self._keys is not None and self._hashes is not None:
            keys, hashes = torch.cat([self._keys, keys], 1), torch.cat([self._hashes, hashes])
        self._keys, self._hashes = self._least(keys, hashes)

    def _least(self, keys: Tensor, hashes: Tensor) -> tuple[Tensor, Tensor]:
        order = hashes.argsort(stable=True)[: self.size]
        return keys[:, order], hashes[order]
