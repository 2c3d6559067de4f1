"""Distributions over keys and codes while a model is evaluated, in a few numbers: what trackers show beside scalars.

    code_share    share of the keys by code, the most frequent code first, S bins or MOST_BINS of equal width
    norm_ratio    keys by ‖code‖/‖key‖, 0 to 2, the last bin what is larger too
    angle         keys by the angle to their code, degrees

Every key counts that the evaluation reads, also those of overlapping windows whose tokens are not scored again.

Axes:  B batch  H key heads  T length  K key width  S codes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from transformer_vq.evaluation.crew import Crew
from transformer_vq.ops.nearest import lookup
from transformer_vq.ops.turn import turn
from transformer_vq.quantizers import Quantized, Quantizer
from transformer_vq.quantizers.health import code_counts

BINS = 48
MOST_BINS = 64
LARGEST_RATIO = 2.0


class Histogram(NamedTuple):
    """Counts between edges."""

    counts: NDArray[np.float64]
    """(n,)."""
    edges: NDArray[np.float64]
    """(n+1,)."""


class KeyHistograms:
    """Listens to quantizers while the `with` block runs; `histograms()` are of all they saw."""

    def __init__(self, quantizers: Mapping[str, Quantizer]) -> None:
        """quantizers: by name, those to listen to; none: nothing happens."""
        self.quantizers = quantizers
        self._counts: dict[str, Tensor] = {}
        self._ratios: dict[str, Tensor] = {}
        self._angles: dict[str, Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        self._hooks = [q.register_forward_hook(self._listener(name)) for name, q in self.quantizers.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def shared(self, crew: Crew) -> Self:
        """This, standing for the keys of all processes, which have listened to the same quantizers."""
        for sums in (self._counts, self._ratios, self._angles):
            parts = crew.everyones({name: tensor.cpu() for name, tensor in sums.items()})
            for name in {name for part in parts for name in part}:
                sums[name] = torch.stack([part[name] for part in parts if name in part]).sum(0)
        return self

    def histograms(self) -> dict[str, Histogram]:
        """`layer0/code_share` and so on, for quantizers that saw a key; means over heads."""
        found = {}
        for name, counts in self._counts.items():
            found[f"{name}/code_share"] = by_rank(counts.cpu().numpy())
            for what, sums, end in (("norm_ratio", self._ratios, LARGEST_RATIO), ("angle", self._angles, 180.0)):
                found[f"{name}/{what}"] = Histogram(sums[name].cpu().numpy(), np.linspace(0, end, BINS + 1))
        return found

    def _listener(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Quantized], None]:
        def listen(quantizer: Quantizer, inputs: tuple[Any, ...], result: Quantized) -> None:
            k, codebook = inputs[0], quantizer.codebook.detach()
            mask = inputs[1] if len(inputs) > 1 else None
            counts = code_counts(result.codes, codebook.shape[1], mask).double()
            angle, ratio = turn(k, lookup(codebook, result.codes))
            if mask is not None:
                angle, ratio = (x[mask[:, None].expand_as(x)] for x in (angle, ratio))
            for sums, new in (
                (self._counts, counts),
                (self._ratios, binned(ratio, LARGEST_RATIO)),
                (self._angles, binned(angle.rad2deg(), 180.0)),
            ):
                sums[name] = sums[name] + new if name in sums else new

        return listen  # type: ignore[return-value]


def binned(values: Tensor, end: float) -> Tensor:
    """Counts (BINS,) fp64 of values in 0 … end, larger ones in the last bin; those that are no number are left out."""
    known = values[~values.isnan()]
    place = (known / (end / BINS)).clamp(0, BINS - 1).long()
    return torch.bincount(place, minlength=BINS).double()


def by_rank(counts: NDArray[np.float64]) -> Histogram:
    """counts (H, S) -> shares by rank, each head's most frequent code first, mean over heads.

    More than MOST_BINS codes are put together, so that n is bounded; the shares of all bins sum to one.
    """
    total = counts.sum(-1, keepdims=True)
    share = (-np.sort(-counts, -1) / np.maximum(total, 1)).mean(0)
    edges = np.unique(np.linspace(0, len(share), min(len(share), MOST_BINS) + 1).astype(np.int64))
    return Histogram(np.add.reduceat(share, edges[:-1]), edges.astype(np.float64))
