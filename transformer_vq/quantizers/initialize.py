"""The first codebook, from keys: some of them, or their k-means centres. No third party, several heads at once.

Axes:  H heads  N keys  K key width  S codes
"""

from __future__ import annotations

import torch
from torch import Tensor

from transformer_vq.ops.nearest import nearest_code
from transformer_vq.quantizers.statistics import key_sums

ITERATIONS = 10
KEYS_PER_CODE = 64  # k-means looks at no more keys than this times S


def sample_keys(keys: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """S different keys of each head, (H, N, K) -> (H, S, K), at the same places in all heads.

    generator: on the CPU, so that every device draws the same.
    Raises ValueError when there are fewer keys than codes.
    """
    if keys.shape[1] < size:
        raise ValueError(f"{keys.shape[1]} keys a head are fewer than {size} codes")
    return keys[:, torch.randperm(keys.shape[1], generator=generator)[:size].to(keys.device)]


def kmeans(keys: Tensor, size: int, generator: torch.Generator, metric: str = "euclidean") -> Tensor:
    """Centres (H, S, K) of keys (H, N, K) after ten of Lloyd's iterations, from a sample of the keys.

    A centre that loses all its keys stays where it was. With metric "cosine" keys go to the centre of closest angle.
    Raises ValueError when there are fewer keys than codes.
    """
    wide = torch.promote_types(keys.dtype, torch.float32)
    keys = sample_keys(keys, min(keys.shape[1], KEYS_PER_CODE * size), generator).to(wide)
    centres = sample_keys(keys, size, generator).clone()
    rows = keys[None]  # one row of a batch, (1, H, N, K)
    for _ in range(ITERATIONS):
        codes = nearest_code(rows, centres, metric)
        counts = torch.stack([torch.bincount(head, minlength=size) for head in codes[0]])[..., None]
        centres = torch.where(counts > 0, key_sums(rows, codes, size, None) / counts.clamp_min(1), centres)
    return centres
