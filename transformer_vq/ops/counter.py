"""Random numbers that are arithmetic on counters: no generator, no order of drawing, one graph for the compiler.

A number follows from (seed, row of the step's batch, place of the token in its row, entry). So it is the same however
the rows are spread over micro-batches and processes, when a forward pass is recomputed, and on every device.

    row    = mix(mix(seed + γ) + (row + 1)·γ)
    token  = mix(row + (place + 1)·γ)
    entry  = mix(token + (entry + 1)·γ)

mix is the finaliser of splitmix64 [Steele 2014, doi 10.1145/2660193.2660195, figure 14], γ its step: the entries of a
token are that generator's outputs, started at the token. Integers are int64 and wrap around.

Axes:  B batch  H heads  T length  K key width
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GAMMA, FIRST, SECOND = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mix(x: Tensor) -> Tensor:
    """Bits of int64 numbers stirred, one to one."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * FIRST  # >> repeats the sign: what it shifts in is masked off
    x = (x ^ ((x >> 27) & (2**37 - 1))) * SECOND
    return x ^ ((x >> 31) & (2**33 - 1))


def token_states(seed: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """seed () int64, rows (B,) and places (T,) or (B, T) int64 -> (B, T) int64, on the device of the rows."""
    row = mix(mix(seed + GAMMA) + (rows + 1) * GAMMA)
    return mix(row[:, None] + (places + 1) * GAMMA)


def row_states(seed: Tensor, rows: Tensor) -> Tensor:
    """seed () int64, rows (B,) int64 -> (B,) int64."""
    return mix(mix(seed + GAMMA) + (rows + 1) * GAMMA)


def bits(states: Tensor, entries: Tensor) -> Tensor:
    """64 random bits of each entry: states and entries, int64, broadcast."""
    return mix(states + (entries + 1) * GAMMA)


def uniform(random: Tensor) -> Tensor:
    """Bits int64 -> fp32 in (0, 1), ends excluded: the middles of 2^23 intervals."""
    return (((random >> 41) & (2**23 - 1)).float() + 0.5) / 2**23


def normal(random: Tensor) -> Tensor:
    """Bits int64 -> standard normal fp32, by Box and Muller's cosine; the length has 32 bits, the angle 32."""
    length = (((random >> 32) & (2**32 - 1)).float() + 0.5) / 2**32
    angle = (random & (2**32 - 1)).float() * (2 * math.pi / 2**32)
    return (-2 * length.log()).sqrt() * angle.cos()


def drop(x: Tensor, p: float, states: Tensor) -> Tensor:
    """Dropout of the entries of x (..., D) with chance p; states (...) int64 -> the same shape and dtype.

    Sixteen bits an entry: p is rounded to a multiple of 2^-16, and what survives is scaled by the rounded one.
    """
    D, threshold = x.shape[-1], round(p * 2**16)
    if threshold == 0:
        return x
    if threshold == 2**16:
        return x * 0
    quarters = torch.arange(-(-D // 4), device=x.device)
    words = bits(states[..., None], quarters)
    keep = words.view(torch.int16)[..., :D] >= threshold - 2**15
    return torch.where(keep, x * (2**16 / (2**16 - threshold)), 0)
