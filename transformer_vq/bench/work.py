"""How much work a call is: floating-point operations and bytes, by formula. `tests/bench/test_work.py` counts them.

One multiply-add is 2 FLOPs. Bytes are the least that must move: inputs read once, results written once.

Axes:  B rows  H query heads  Hkv key heads  T length  K, V widths  S codes  M window  L block  N keys
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


def vq_attention(
    heads: int,
    length: int,
    width: int,
    codes: int,
    window: int,
    block_len: int,
    size: int = 4,
    rows: int = 1,
    lookup: bool = False,
) -> Work:
    """Block-wise, K = V = width, as many key heads as query heads, numbers of `size` bytes.

    A query meets S means and the M+L keys of its strip. Forward: q·k and p·v, 2 products a pair. Backward: q·k again,
    do·v, pᵀ·do, ds·k, and over the strip alone dsᵀ·q: a code gets no gradient. lookup: S distances a key, keys read,
    their rows and codes written.
    """
    columns, strip = codes + window + block_len, window + block_len
    keys = rows * heads * length
    flops, moved = 2 * keys * width * (6 * columns + strip), _tensors(keys, width, size) + 2 * keys * 8
    if lookup:
        flops, moved = flops + 2 * keys * width * codes, moved + keys * (2 * width * size + 8)
    return Work(flops, moved)


def full_attention(heads: int, length: int, width: int, size: int = 4) -> Work:
    """Causal: half of all pairs; 2 products forward, 5 backward."""
    return Work(7 * 2 * heads * width * length * (length + 1) / 2, _tensors(heads * length, width, size))


def _tensors(keys: int, width: int, size: int) -> int:
    """Forward: q, k, v read, o written. Backward: these and do read, dq, dk, dv written."""
    return 12 * keys * width * size


def quantizer(keys: int, dim: int, codes: int, size: int = 4) -> Work:
    """N keys of one head, forward and backward: S distances each.

    Forward: keys read, their rows and codes written. Backward, as rotation needs it: gradient, keys and rows read, the
    keys' gradient written. The codebook is read, sums are written and the codebook renewed.
    """
    return Work(2 * keys * dim * codes, 6 * keys * dim * size + keys * 8 + 3 * codes * dim * size)


def training(flops_per_token: float, tokens: int, parameters: int) -> Work:
    """A step with AdamW: three times the forward pass, and what the optimizer moves."""
    return Work(TRAINING * flops_per_token * tokens, optimizer(parameters))


def optimizer(parameters: int) -> int:
    """Bytes of weights read forward and backward and gradients written, and of AdamW, which reads gradients, and reads
    and writes weights and two moments; all fp32.
    """
    return 4 * parameters * (3 + 1 + 2 * 3)


def token(flops_per_token: float, weights: float, state: float) -> Work:
    """One token of one text: bytes of weights and state, each read once."""
    return Work(flops_per_token, weights + state)
