"""How long a block of block-wise attention should be, where that changes nothing but the time.

Longer blocks see more keys of the future, which are hidden again; shorter ones make more means, S·V numbers a block.
Counted here, for one key head, forward and backward, what a token costs; the smallest cost wins.

    products   2·G·((3K+3V)·(S+M+L) + K·(M+L)) a token, and the running sums over the n blocks of a chunk, which are
               products with (n+1)² entries; FLOPs
    passes     over logits, means and keys: numbers that operations read and write, from counting them

Axes:  G queries a key head  K, V widths  S codes  M window  L block  n blocks of a chunk
"""

from __future__ import annotations

CHOICES = (16, 32, 64, 128)
ELSEWHERE = 128
"""On other devices than CPUs, where each backend has a geometry of its own."""
ROWS = 4096
"""Queries of a chunk on a CPU, see blocks.py."""
NUMBER = 12
"""FLOPs that take as long as one number read or written: 40 to 60 GFLOP/s a core against 0.2 to 0.4 ns a number."""


def flops(L: int, S: int, M: int, G: int, K: int, V: int, two_sided: bool) -> float:
    """Of products, a token. two_sided: keys beyond the window are met by other queries than those inside."""
    n = max(1, ROWS // (L * G))
    sides = 3 * K * (M + L) if two_sided else 0
    pairs = 2 * G * (3 * (K + V) * (S + M + L) + K * (M + L) + sides)
    return pairs + 2 * (n + 1) ** 2 * S * (3 * V + 2) / (n * L)


def passes(L: int, S: int, M: int, G: int, K: int, V: int, two_sided: bool) -> float:
    """Numbers read and written outside of products, a token."""
    strip, turned = (25, 10) if two_sided else (4, 2)
    logits = G * (6 * (S + M + L) + turned * (M + L))
    return logits + (20 * S * V + 6 * S * K + strip * (M + L) * (K + V)) / L + 16 * G * (K + V)


def cheapest(S: int, M: int, G: int, K: int, V: int, two_sided: bool) -> int:
    """L for S codes (0: no cache), a window of M, G query heads a key head, widths K and V; on a CPU."""

    def cost(L: int) -> float:
        sizes = (L, S, M, G, K, V, two_sided)
        return flops(*sizes) + NUMBER * passes(*sizes)

    return min(CHOICES, key=cost)


def chosen(device: str, S: int, M: int, G: int, K: int, V: int, two_sided: bool) -> tuple[int, str]:
    """L on a device of this type, and why, in words."""
    if device != "cpu":
        return ELSEWHERE, f"the same for every model on {device}"
    L = cheapest(S, M, G, K, V, two_sided)
    return L, f"least counted work a token on cpu, with {S} codes, window {M}, query heads a key head {G}"
