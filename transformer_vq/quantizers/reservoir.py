"""A sample of the keys of a step that does not depend on how its batch is cut: those that a hash puts first.

Every micro-batch and process keeps its own n keys of least hash of (seed, layer, step, row, place); the least of all
of them are the least of the whole batch. So memory is n keys a head, whatever the batch.

Axes:  B batch  H heads  T length  K key width  n at most `size` keys
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from transformer_vq.ops import counter
from transformer_vq.ops.estimators.noise import Noise
from transformer_vq.quantizers.processes import is_distributed, join_processes, most_over_processes

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
        """(H, n, K) of all processes, the same on each; like: for one that kept nothing. Every process must call it.

        The host reads how many keys there are: for a codebook's start, not for every step.
        """
        mine, hashes = self._kept(like)
        keys, n = self._joined(most_over_processes(len(hashes), mine.device), like)
        return keys[:, : int(n)]

    def ranked(self, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The same with padding behind, (H, at most size, K), and n, () int64, which the host does not read.

        Every process sends as many keys as a full one: how many of them count, their hashes say.
        """
        return self._joined(self.size, like)

    def _joined(self, n: int, like: Tensor | None) -> tuple[Tensor, Tensor]:
        """Every process sends n keys, at least as many as each kept."""
        keys, hashes = self._kept(like)
        if n and is_distributed():
            missing = n - len(hashes)
            keys, hashes = F.pad(keys, (0, 0, 0, missing)), torch.cat([hashes, hashes.new_full((missing,), PADDING)])
            keys, hashes = self._least(join_processes(keys), join_processes(hashes[None, :, None])[0, :, 0])
        self._keys, self._hashes = keys, hashes
        return keys, (hashes != PADDING).sum()

    def _kept(self, like: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys (H, n, K) and hashes (n,) of this process."""
        if self._keys is None or self._hashes is None:
            assert like is not None
            wide = torch.promote_types(like.dtype, torch.float32)
            none = like.new_zeros(like.shape[1], 0, like.shape[3], dtype=wide)
            return none, torch.zeros(0, dtype=torch.int64, device=like.device)
        return self._keys, self._hashes

    def _merge(self, keys: Tensor, hashes: Tensor) -> None:
        if self._keys is not None and self._hashes is not None:
            keys, hashes = torch.cat([self._keys, keys], 1), torch.cat([self._hashes, hashes])
        self._keys, self._hashes = self._least(keys, hashes)

    def _least(self, keys: Tensor, hashes: Tensor) -> tuple[Tensor, Tensor]:
        order = hashes.argsort(stable=True)[: self.size]
        return keys[:, order], hashes[order]
