"""Random numbers that depend on names and counts alone: every process and every recomputation draws the same."""

from __future__ import annotations

import hashlib

import torch


def seed_number(*parts: int | str) -> int:
    """A hash of `parts`, like (seed, layer, step, "noise"), that fits an int64."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


def seeded(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose seed is a hash of `parts`."""
    return torch.Generator(device).manual_seed(seed_number(*parts))
