"""How much work a call is: floating-point operations and bytes, by formula. `tests/bench/test_work.py` counts them.

One multiply-add is 2 FLOPs. Bytes are the least that must move: inputs read once, results written once.

Axes:  B rows  H query heads  Hkv key heads  T length  K, V widths  S codes  M window  L block
"""

from __future__ import annotations

from typing import NamedTuple

from transformer_vq.models.describe import TRAINING


class Work(NamedTuple):
    """Of one call, forward and backward."""

    flops: float
    bytes: float

    def seconds(self, flops: float, bandwidth: float) -> float:
        """The least that it can take under these ceilings: the roofline."""
        return max(self.flops / flops, self.bytes / bandwidth)


def vq_attention(heads: int, length: int, width: int, codes: int, window: int, block_len: int, size: int = 4) -> Work:
    """Block-wise, K = V = width, as many key heads as query heads, one row, numbers of `size` bytes.

    A query meets S means and the M+L keys of its strip. Forward: q·k and p·v, 2 products a pair. Backward: q·k again,
    do·v, pᵀ·do, ds·k, and over the strip alone dsᵀ·q: a code gets no gradient.
    """
    columns, strip = codes + window + block_len, window + block_len
    pairs = 2 * heads * length * width
    return Work(pairs * (6 * columns + strip), _tensors(heads, length, width, size) + 2 * heads * length * 8)


def full_attention(heads: int, length: int, width: int, size: int = 4) -> Work:
    """Causal: half of all pairs; 2 products forward, 5 backward."""
    return Work(7 * 2 * heads * width * length * (length + 1) / 2, _tensors(heads, length, width, size))


def _tensors(heads: int, length: int, width: int, size: int) -> int:
    """Forward: q, k, v read, o written. Backward: these and do read, dq, dk, dv written."""
    return 12 * heads * length * width * size


def training(flops_per_token: float, tokens: int, parameters: int) -> Work:
    """A step with AdamW: three times the forward pass; weights, gradients and two moments read and written in fp32."""
    return Work(TRAINING * flops_per_token * tokens, 4 * parameters * (3 + 2 * 4))


def token(flops_per_token: float, parameters: int, state_bytes: int) -> Work:
    """One token of one text: every weight read once in fp32, the state read and written."""
    return Work(flops_per_token, 4 * parameters + 2 * state_bytes)
