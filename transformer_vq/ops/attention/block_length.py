"""How long a block of block-wise attention should be, where that changes nothing but the time.

Longer blocks see more keys of the future, which are hidden again; shorter ones make more means, S·V numbers a block.
A text of about as many tokens as there are codes is best one block: then no key is left of it, and no mean is made.
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
NATIVE = 64
"""Of backend native: two tiles. Shorter blocks renew means more often, longer ones leave more keys in the strip."""
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


def cost(L: int, S: int, M: int, G: int, K: int, V: int, two_sided: bool) -> float:
    """Of a token, in FLOPs."""
    sizes = (L, S, M, G, K, V, two_sided)
    return flops(*sizes) + NUMBER * passes(*sizes)


def cheapest(S: int, M: int, G: int, K: int, V: int, two_sided: bool) -> int:
    """L for S codes (0: no cache), a window of M, G query heads a key head, widths K and V; on a CPU."""
    return min(CHOICES, key=lambda L: cost(L, S, M, G, K, V, two_sided))


def longest_alone(S: int, M: int, G: int, K: int, V: int, two_sided: bool) -> int:
    """How many tokens at most, with none before them, cost less as one block without means than as blocks with them."""
    L = cheapest(S, M, G, K, V, two_sided)
    known, most, low, high = S > 0, cost(L, S, M, G, K, V, two_sided), L, 2**20
    while known and high - low > 1:  # from L on the cost of one block only grows
        middle = (low + high) // 2
        less = cost(middle, 0, M, G, K, V, two_sided) <= most
        low, high = (middle, high) if less else (low, middle)
    return low if known else 0


def chosen(
    device: str, S: int, M: int, G: int, K: int, V: int, two_sided: bool, alone: int | None = None
) -> tuple[int, str]:
    """L on a device of this type, and why, in words. alone: the tokens of a call before which nothing was."""
    if device != "cpu":
        return ELSEWHERE, f"the same for every model on {device}"
    if alone is not None and alone <= (most := longest_alone(S, M, G, K, V, two_sided)):
        return alone, f"one block: up to {most} tokens with none before them cost less than means of {S} codes on cpu"
    L = cheapest(S, M, G, K, V, two_sided)
    return L, f"least counted work a token on cpu, with {S} codes, window {M}, query heads a key head {G}"
