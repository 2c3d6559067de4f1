"""Memory that opaque ops need inside, beside what goes in and comes out: their own work runs on fake tensors.

Those of attention are in attention/scratch.py; `add_rows` needs nothing. The two here go by heads and chunks of keys,
and each chunk takes the memory of the one before it: two chunks tell of all.

Axes:  B batch  H heads  T length  K key width  S codes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transformer_vq.ops import nearest
from transformer_vq.ops.estimators import soft
from transformer_vq.ops.kernels.device import OLDEST, architecture, installed, rehearsal
from transformer_vq.ops.live_bytes import Inside, LiveBytes


def inside(device: str) -> dict[Any, Inside]:
    """What `LiveBytes` asks about lookups and soft estimators. device: cpu | cuda, where the model really runs.

    Calls that differ in numbers alone are run once.
    """
    known: dict[Any, int] = {}

    def once(ask: Inside) -> Inside:
        def asked(*values: Any) -> int:
            key = (ask, *((x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in values))
            if key not in known:
                known[key] = ask(*values)
            return known[key]

        return asked

    def lookup(k: Tensor, codebook: Tensor, metric: str) -> int:
        return (
            in_kernel(k, codebook, metric)
            if kernels and nearest.fusible(k, codebook)
            else in_chunks(k, codebook, metric)
        )

    kernels = device == "cuda" and kernels_run()
    ops = torch.ops.transformer_vq
    return {ops.nearest_code.default: once(lookup), ops.soft_gradients.default: once(of_softmax)}


def kernels_run() -> bool:
    """Whether a GPU would run kernels: the one that is here; without one, any that they know."""
    return installed() and (not torch.cuda.is_available() or architecture(torch.device("cuda")) >= OLDEST)


def in_chunks(k: Tensor, codebook: Tensor, metric: str) -> int:
    """Of `nearest.chunked`: of two heads and two chunks."""
    chunk, rows = nearest.keys_at_once(codebook.shape[1], k.shape[2])
    part = k[: 2 * rows, :2, : 2 * chunk]
    return beside(lambda: nearest.chunked(part, codebook[:2], metric))


def in_kernel(k: Tensor, codebook: Tensor, metric: str) -> int:
    """Of `nearest.fused`: what its launcher allocates."""
    with rehearsal():
        return beside(lambda: nearest.fused(k, codebook, metric))


def of_softmax(
    k: Tensor, codebook: Tensor, codes: Tensor, g: Tensor, temperature: float, second_order: bool, tokens: Tensor | None
) -> int:
    """Of `soft.gradients`: of all heads, whose codebooks have a gradient each, and two chunks of every head."""
    chunk = 2 * soft.keys_at_once(codebook.shape[1])
    rows = 1 if k.shape[2] >= chunk else 2
    k, codes, g = (x[:rows, :, :chunk] for x in (k, codes, g))
    tokens = None if tokens is None else tokens[:rows, :chunk]
    return beside(lambda: soft.gradients(k, codebook, codes, g, temperature, second_order, tokens))


def beside(work: Callable[[], Any]) -> int:
    """Peak of a run, less what it returns.  Call inside of FakeTensorMode."""
    with torch.no_grad(), LiveBytes() as live:
        made = work()
        made = [made] if isinstance(made, Tensor) else made
        found: int = live.peak - sum(x.untyped_storage().nbytes() for x in made)
        return found
