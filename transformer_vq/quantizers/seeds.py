"""Random numbers that depend on names and counts alone: every process and every recomputation draws the same."""

from __future__ import annotations

import hashlib

import torch


def seeded(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose seed is a hash of `parts`, like (seed, layer, step, "noise")."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))
