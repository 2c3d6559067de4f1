"""Codebook health over a whole split: counts of codes added up over all batches, not means of batch numbers.

A batch's perplexity grows with the batch; these numbers do not depend on how the split was cut. Processes that read a
part each put theirs together: sums go by the place of a batch in the split, so that they are the same to the last bit;
only the Gram matrix of the keys, too large to be kept by batch, is added up by process.

Axes: B batch, H key heads, T length, K key width, S codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Self, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from transformer_vq.evaluation.crew import Crew
from transformer_vq.models import TransformerVQ
from transformer_vq.models.attention import VQAttention
from transformer_vq.quantizers import Quantized, Quantizer
from transformer_vq.quantizers.health import batch_health, code_counts, effective_rank, perplexity

MEANS = ("norm_ratio", "cosine", "relative_error")
Place = tuple[int, ...]


class Found(NamedTuple):
    """Sums of one layer over the batches that one process has read; see `LayerHealth`."""

    sums: dict[Place, tuple[float, ...]]
    counts: Tensor
    key_gram: Tensor
    code_rank: float


class LayerHealth:
    """What one layer's quantizer did with the keys that counted."""

    def __init__(self, codebook: Tensor) -> None:
        heads, size, width = codebook.shape
        self.code_rank = effective_rank(codebook.mT @ codebook).item()
        self.key_gram = torch.zeros(heads, width, width, dtype=torch.float64, device=codebook.device)
        self.counts = torch.zeros(heads, size, dtype=torch.float64)
        self.sums: dict[Place, tuple[float, ...]] = {}  # by batch: its tokens, and each of MEANS times that

    def add(self, k: Tensor, result: Quantized, counted: Tensor, place: Place | None = None) -> None:
        """k (B, H, T, K); counted (B, T) bool: the tokens whose keys count; place: of the batch in the split, one that
        no other has; None: the next one.
        """
        counts = code_counts(result.codes, self.counts.shape[1], counted)
        q = result.quantized
        distance = (k - q).to(torch.promote_types(q.dtype, torch.float32)).square().sum(-1)
        health = batch_health(k, q, distance, counts, counted)
        tokens = int(counted.sum())
        place = (len(self.sums),) if place is None else place
        self.sums[place] = (tokens, *(health[name].item() * tokens for name in MEANS))
        keys = rearrange(k * counted[:, None, :, None], "b h t k -> h (b t) k").to(distance.dtype)
        self.key_gram += keys.mT @ keys
        self.counts += counts.cpu().double()

    def found(self) -> Found:
        """What the other processes have to know."""
        return Found(self.sums, self.counts, self.key_gram.cpu(), self.code_rank)

    def take(self, parts: Sequence[Found]) -> None:
        """Stand for all processes from here on, this one's own part among them."""
        self.sums = {place: sums for part in parts for place, sums in part.sums.items()}
        self.counts = torch.stack([part.counts for part in parts]).sum(0)
        self.key_gram = torch.stack([part.key_gram for part in parts]).sum(0)
        self.code_rank = parts[0].code_rank

    def _rows(self) -> list[tuple[float, ...]]:
        return [(0,) * (1 + len(MEANS)), *(self.sums[place] for place in sorted(self.sums))]

    def summary(self) -> dict[str, float]:
        """See `SplitHealth`."""
        used = (self.counts > 0).double()
        tokens, *totals = (sum(column) for column in zip(*self._rows(), strict=True))
        return {
            "usage": used.mean().item(),
            "perplexity": perplexity(self.counts).item(),
            "dead_codes": (1 - used).sum(-1).mean().item(),
            **{name: total / max(tokens, 1) for name, total in zip(MEANS, totals, strict=True)},
            "key_rank": effective_rank(self.key_gram).item(),
            "code_rank": self.code_rank,
        }


class SplitHealth:
    """Listens to every quantizer of a model while its `with` blocks run.

    `summary()` -> per layer `layer0/usage` (share of the codes that were chosen at least once), `perplexity` (exp of
    the entropy of the choices), `dead_codes` (never chosen; in training records: by the running counts), the means of
    `norm_ratio`, `cosine` and `relative_error` as a batch has them, and the effective ranks `key_rank` and `code_rank`;
    all averaged over heads. Layers that do not quantize, or not yet, have none.
    """

    def __init__(self, model: TransformerVQ) -> None:
        self.layers: dict[int, LayerHealth] = {}
        self.counted: Tensor | None = None
        self.place: Place | None = None
        layers = enumerate(cast(Iterable[VQAttention], model.layers))
        self._quantizers: dict[int, Quantizer] = {i: layer.quantizer for i, layer in layers if layer.quantizes}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        for i, quantizer in self._quantizers.items():
            self._hooks.append(quantizer.register_forward_hook(self._listener(i)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def count_only(self, counted: Tensor, place: Place | None = None) -> None:
        """(B, T) bool: the tokens of the coming call whose keys count; place as `LayerHealth.add` has it."""
        self.counted, self.place = counted, place

    def shared(self, crew: Crew) -> Self:
        """This, standing for what all processes have read."""
        parts = crew.everyones({i: layer.found() for i, layer in self.layers.items()})
        for i in sorted({i for part in parts for i in part}):
            found = [part[i] for part in parts if i in part]
            if i not in self.layers:  # this process read nothing
                gram, size = found[0].key_gram, found[0].counts.shape[1]
                self.layers[i] = LayerHealth(gram.new_zeros(len(gram), size, gram.shape[1]))
            self.layers[i].take(found)
        return self

    def summary(self) -> dict[str, float]:
        """Flat, as in the class's text."""
        return {f"layer{i}/{name}": x for i, layer in self.layers.items() for name, x in layer.summary().items()}

    def _listener(self, i: int) -> Callable[[nn.Module, tuple[Any, ...], Quantized], None]:
        def listen(quantizer: Quantizer, inputs: tuple[Any, ...], result: Quantized) -> None:
            assert self.counted is not None, "count_only comes before the model's call"
            if i not in self.layers:  # now that a codebook made of parameters, which may be cut up, is whole
                self.layers[i] = LayerHealth(quantizer.codebook.detach())
            self.layers[i].add(inputs[0], result, self.counted, self.place)

        return listen  # type: ignore[return-value]
