"""Block-wise VQ attention for wide values (V > 256, the paper's 1,536 and 4,096): products of 16 bits, sums of 32.

The walk is blockwise's, in chunks of at most 16,384 queries. Queries, keys, values, cached means, P and dX enter the
batched products in the call's own 16 bits; logits, softmax, counts, sums and gradients are fp32. With fp32 and fp64
tensors nothing is narrowed, and the result is blockwise's.

Oracle: quadratic.py.
"""

from __future__ import annotations

from torch import Tensor

from transformer_vq.ops.attention import blockwise
from transformer_vq.ops.attention.blocks import rows_at_once
from transformer_vq.ops.attention.blockwise import Manner, block_length, layout, learned_gradients
from transformer_vq.ops.attention.by_hand import by_hand
from transformer_vq.ops.attention.call import Call

ROWS = 16_384
"""Queries of a chunk at most: means and sums of its blocks are S·V numbers each, a gigabyte where V is 4,096."""
BLOCK = 512
"""L where it is free, but on a CPU: each block has means of its own, written and read once, and shorter ones more."""


def manner(call: Call) -> Manner:
    """Narrow what is of 16 bits."""
    common, device = call.common_dtype, call.q.device
    narrow = common if common.itemsize == 2 else call.wide_dtype
    on_accelerator, free = device.type != "cpu", call.gradients == "window"
    L = min(BLOCK, call.q.shape[3]) if on_accelerator and free else block_length(call, blockwise.LONGEST_BLOCK)
    return Manner(narrow, L, min(ROWS, rows_at_once(device)), not blockwise.alone(call, L))


def wide(call: Call) -> Tensor:
    """`Call` -> o (B, Hkv, G, T, V)."""
    return by_hand(call, notes, forward, backward)


def notes(call: Call) -> list[Tensor]:
    """For the backward pass: the cache at the start of each chunk, counts and sums."""
    return list(blockwise.starts(call, manner(call)))


def forward(call: Call, notes: list[Tensor]) -> Tensor:
    """`Call` -> o, and the notes filled."""
    return blockwise.attend(*layout(call, manner(call)), (notes[0], notes[1]))


def backward(call: Call, o: Tensor, notes: list[Tensor], d_o: Tensor) -> list[Tensor]:
    """Gradients of `call.learned()`."""
    begun = notes[0], notes[1]
    return learned_gradients(call, manner(call), lambda plan, x: blockwise.gradients(plan, x, d_o, begun))
