"""How large the pieces are that a program works on: a fixed table, so that all runs round alike.

Entries are for fitting registers and shared memory of sm_80 and sm_90 (tests/ops/attention/test_compiled.py); no timing
stands behind them yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from transformer_vq.ops.kernels.device import interpreted


class Tile(NamedTuple):
    """Rows and columns of a product, and how it is compiled."""

    rows: int
    columns: int
    warps: int
    stages: int = 2
    split: bool = True
    """Loops of their own for the parts of a strip. They need fewer operations, and more registers."""


class Tiles(NamedTuple):
    """Of one call."""

    forward: Tile
    """Queries × keys."""
    queries: Tile
    """Queries × keys."""
    keys: Tile
    """Keys × queries."""
    sums: Tile
    """Codes × keys."""
    sweep: Tile
    """Codes × queries."""
    renewal: int = 512
    """Tokens between two renewals of the cache, at least; a multiple of L under the gradient rule `block`."""
    group: int = 8
    """Blocks that one program of the sweep walks through."""


def whole(rows: int, columns: int, warps: int) -> Tile:
    """A tile whose strip is one loop."""
    return Tile(rows, columns, warps, split=False)


SUMS, WIDE_SUMS = Tile(64, 64, 4), Tile(64, 32, 8)
SUMS_80 = Tile(64, 64, 8)
INTERPRETED = Tiles(*[Tile(16, 16, 4)] * 5, renewal=512, group=8)
"""Of the interpreter, where only the number of steps counts."""

PLAIN = {
    (90, 64): Tiles(Tile(128, 64, 8), Tile(128, 32, 8), Tile(128, 32, 8), SUMS, Tile(128, 64, 8)),
    (90, 128): Tiles(Tile(128, 64, 8), Tile(128, 64, 8), whole(128, 32, 8), WIDE_SUMS, Tile(128, 64, 8)),
    (90, 256): Tiles(whole(128, 32, 8), whole(128, 32, 8), whole(32, 32, 8), WIDE_SUMS, Tile(64, 32, 8)),
    (80, 64): Tiles(Tile(128, 64, 8), Tile(128, 32, 8), Tile(128, 32, 8), SUMS_80, Tile(64, 32, 8)),
    (80, 128): Tiles(Tile(128, 32, 8), Tile(64, 64, 8), whole(64, 32, 8), WIDE_SUMS, Tile(64, 64, 8)),
    (80, 256): Tiles(whole(64, 32, 8), whole(64, 32, 8), whole(32, 32, 8), WIDE_SUMS, Tile(64, 32, 8)),
}
"""(architecture, width): without positions, documents and carried keys, 16-bit tensors."""

MORE = {
    (90, 64): PLAIN[90, 64]._replace(forward=Tile(128, 32, 8), keys=whole(128, 32, 8)),
    (90, 128): PLAIN[90, 128]._replace(forward=whole(128, 32, 8), queries=whole(64, 32, 8), keys=whole(64, 32, 8)),
    (90, 256): PLAIN[90, 256]._replace(forward=whole(64, 16, 8), queries=whole(32, 32, 8), keys=whole(32, 32, 8)),
    (80, 64): PLAIN[80, 64]._replace(forward=whole(128, 32, 8), queries=whole(32, 16, 8), keys=whole(32, 32, 8)),
    (80, 128): PLAIN[80, 128]._replace(forward=whole(64, 32, 8), queries=whole(64, 16, 8), keys=whole(32, 32, 8)),
    (80, 256): PLAIN[80, 256]._replace(forward=whole(32, 32, 8), queries=whole(32, 16, 8), keys=whole(32, 32, 8)),
}
"""The same with any of them: more tensors at once."""

SWEEP_100 = {128: Tile(64, 64, 8), 256: Tile(32, 64, 8)}
"""By width: what the generation after sm_90 cannot do as sm_90 does."""

SINGLE = {
    64: Tiles(*[Tile(32, 32, 8, 1, split=False)] * 3, Tile(32, 32, 4, 1), Tile(32, 32, 8, 1)),
    128: Tiles(*[Tile(16, 16, 8, 1, split=False)] * 3, Tile(32, 32, 4, 1), Tile(32, 32, 8, 1)),
    256: Tiles(*[Tile(16, 16, 8, 1, split=False)] * 3, Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
}
"""fp32 tensors, by width: products without matrix instructions, exact."""


def tiles(arch: int, K: int, V: int, dtype: torch.dtype, more: bool) -> Tiles:
    """`arch` is 80 for sm_80; the nearest one below that has entries is taken. `more`: bias, rotation, documents.

    sm_120, a desktop's, has neither the shared memory nor the products of sm_90 and sm_100: it takes what sm_80 does.
    """
    arch = arch if arch < 120 else 80
    if interpreted():
        return INTERPRETED
    width = next(w for w in (64, 128, 256) if max(K, V) <= w)
    if dtype == torch.float32:
        return SINGLE[width]
    found = (MORE if more else PLAIN)[90 if arch >= 90 else 80, width]
    return found._replace(sweep=SWEEP_100.get(width, found.sweep)) if arch >= 100 else found
