"""The constant-size memory that VQ attention carries from one call to the next."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionState(NamedTuple):
    """What is left of the tokens read so far. Hkv key heads, S codes, M window; detached, constant in T.

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
    count: Tensor
    """(B, Hkv, S) fp32 or wider: keys older than the window, per code."""
    mean: Tensor
    """(B, Hkv, S, V) fp32 or wider: their mean value; 0 for an empty code."""
    segment: Tensor
    """(B,) int64: id of the last real token's segment."""
    position: Tensor
    """(B,) int64: real tokens read so far in this stream; at 0 `segment` means nothing."""
