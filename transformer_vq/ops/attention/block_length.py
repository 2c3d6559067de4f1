"""How long a block of block-wise attention should be, where that changes nothing but the time.

Longer blocks see more keys of the future, which are hidden again; shorter ones make more means, S·V numbers a block.
Counted here, for one key head, forward and backward, what a token costs; the smallest cost wins.

    products   2·G·((3K+3V)·(S+M+L) + K·(M+L)) a token, and 6·G·K·L where keys beyond the window are seen otherwise than
               those inside; FLOPs
    passes     over logits, means and keys: numbers that operations read and write, from counting them

Axes:  G queries a key head  K, V widths  S codes  M window  L block
"""

from __future__ import annotations

CHOICES = (16, 32, 64, 128)
ELSEWHERE = 128
"""On other devices than CPUs, where each backend has a geometry of its own."""
NUMBER = 12
"""FLOPs that take as long as one number read or written: 40 to 60 GFLOP/s a core against 0.2 to 0.4 ns a number."""


def flops(L: int, S: int, M: int, G: int, K: int, V: int, two_sided: bool) -> float:
    """Of products, a token. two_sided: keys beyond the window are met by other queries than those inside."""
    return 2 * G * (3 * (K + V) * (S + M + L) + K * (M + L) + (3 * K * L if two_sided else 0))


def passes(L: int, S: int, M: int, G: int, K: int, V: int, two_sided: bool) -> float:
    """Numbers read and written outside of products, a token."""
    whole, bubble, of_keys, of_queries = (4, 17, 10, 59) if two_sided else (5.25, 3.5, 1, 7)
    logits = G * (whole * (S + M + L) + bubble * L)
    blocks = (18 * S * V + 4 * S * K + (M + L) * (7 * V + of_keys * K)) / L
    return logits + blocks + G * (of_queries * K + 11 * V)


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
