"""The constant-size memory that VQ attention carries from one call to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transformer_vq.ops.sums import add_rows


class AttentionState(NamedTuple):
    """What is left of the tokens read so far. Hkv key heads, S codes, M window; constant in T.

    Detached between calls; between the pieces of one sequence (split.py) keys, values and means carry gradient.

    The last M real keys of the current document stay exact (right-aligned, oldest first); all older ones are a count
    and a mean value per code.
    """

    codes: Tensor
    """(B, Hkv, M) int64."""
    k_hat: Tensor
    """(B, Hkv, M, K): quantized keys as they were when made, not looked up again."""
    v: Tensor
    """(B, Hkv, M, V)."""
    alive: Tensor
    """(B, M) bool: the slot holds a key that the next token may see."""
    count: Tensor  # type: ignore[assignment]
    """(B, Hkv, S) fp32 or wider: keys older than the window, per code."""
    mean: Tensor
    """(B, Hkv, S, V) fp32 or wider: their mean value; 0 for an empty code."""
    segment: Tensor
    """(B,) int64: id of the last real token's segment."""
    position: Tensor
    """(B,) int64: real tokens read so far in this stream; at 0 `segment` means nothing."""

    def of_type(self, keys: torch.dtype, values: torch.dtype, wide: torch.dtype) -> AttentionState:
        """The same with keys and values of these types, counts and means of type `wide`."""
        return self._replace(
            k_hat=self.k_hat.to(keys), v=self.v.to(values), count=self.count.to(wide), mean=self.mean.to(wide)
        )

    def detach(self) -> AttentionState:
        """The same without gradient."""
        return AttentionState(*(x.detach() for x in self))

    def learned(self) -> list[Tensor]:
        """What carries gradient where anything does: `LEARNED`."""
        return [getattr(self, name) for name in LEARNED]

    def with_learned(self, tensors: Sequence[Tensor]) -> AttentionState:
        """The same with these in their place."""
        return self._replace(**dict(zip(LEARNED, tensors, strict=True)))


LEARNED = ("k_hat", "v", "mean")


def initial_state(
    B: int, Hkv: int, K: int, V: int, S: int, M: int, dtype: torch.dtype, device: torch.device | str
) -> AttentionState:
    """The state before the first token. `dtype` is that of keys and values; counts and means are fp32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    return AttentionState(
        codes=torch.zeros(B, Hkv, M, dtype=torch.int64, device=device),
        k_hat=torch.zeros(B, Hkv, M, K, dtype=dtype, device=device),
        v=torch.zeros(B, Hkv, M, V, dtype=dtype, device=device),
        alive=torch.zeros(B, M, dtype=torch.bool, device=device),
        count=torch.zeros(B, Hkv, S, dtype=wide, device=device),
        mean=torch.zeros(B, Hkv, S, V, dtype=wide, device=device),
        segment=torch.zeros(B, dtype=torch.int64, device=device),
        position=torch.zeros(B, dtype=torch.int64, device=device),
    )


def sum_by_code(codes: Tensor, v: Tensor, S: int) -> tuple[Tensor, Tensor]:
    """Count and summed value of each code: codes (..., T), v (..., T, V) -> (..., S), (..., S, V). Code S: left out."""
    *outer, T, V = v.shape
    lists = math.prod(outer)
    row = codes.reshape(lists, T) + torch.arange(lists, device=codes.device)[:, None] * (S + 1)
    count = v.new_zeros(lists * (S + 1)).index_add_(0, row.flatten(), v.new_ones(row.numel()))
    total = add_rows(v.new_zeros(lists * (S + 1), V), row.flatten(), v.reshape(lists * T, V))
    return count.view(*outer, S + 1)[..., :S], total.view(*outer, S + 1, V)[..., :S, :]
