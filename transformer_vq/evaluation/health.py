"""Codebook health over a whole split: counts of codes added up over all batches, not means of batch numbers.

A batch's perplexity grows with the batch; these numbers do not depend on how the split was cut.

Axes: B batch, H key heads, T length, K key width, S codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from transformer_vq.models import TransformerVQ
from transformer_vq.models.attention import VQAttention
from transformer_vq.quantizers import Quantized, Quantizer
from transformer_vq.quantizers.health import batch_health, code_counts, effective_rank, perplexity

MEANS = ("norm_ratio", "cosine", "relative_error")


class LayerHealth:
    """What one layer's quantizer did with the keys that counted."""

    def __init__(self, codebook: Tensor) -> None:
        heads, size, width = codebook.shape
        self.code_rank = effective_rank(codebook.mT @ codebook).item()
        self.key_gram = torch.zeros(heads, width, width, dtype=torch.float64, device=codebook.device)
        self.counts = torch.zeros(heads, size, dtype=torch.float64)
        self.sums = dict.fromkeys(MEANS, 0.0)
        self.tokens = 0

    def add(self, k: Tensor, result: Quantized, counted: Tensor) -> None:
        """k (B, H, T, K); counted (B, T) bool: the tokens whose keys count."""
        counts = code_counts(result.codes, self.counts.shape[1], counted)
        q = result.quantized
        distance = (k - q).to(torch.promote_types(q.dtype, torch.float32)).square().sum(-1)
        health = batch_health(k, q, distance, counts, counted)
        tokens = int(counted.sum())
        for name in MEANS:
            self.sums[name] += health[name].item() * tokens
        keys = rearrange(k * counted[:, None, :, None], "b h t k -> h (b t) k").to(distance.dtype)
        self.key_gram += keys.mT @ keys
        self.tokens += tokens
        self.counts += counts.cpu().double()

    def summary(self) -> dict[str, float]:
        """See `SplitHealth`."""
        used = (self.counts > 0).double()
        return {
            "usage": used.mean().item(),
            "perplexity": perplexity(self.counts).item(),
            "dead_codes": (1 - used).sum(-1).mean().item(),
            **{name: total / max(self.tokens, 1) for name, total in self.sums.items()},
            "key_rank": effective_rank(self.key_gram).item(),
            "code_rank": self.code_rank,
        }


class SplitHealth:
    """Listens to every quantizer of a model while the `with` block runs.

    `summary()` -> per layer `layer0/usage` (share of the codes that were chosen at least once), `perplexity` (exp of
    the entropy of the choices), `dead_codes` (never chosen; in training records: by the running counts), the means of
    `norm_ratio`, `cosine` and `relative_error` as a batch has them, and the effective ranks `key_rank` and `code_rank`;
    all averaged over heads. Layers that do not quantize, or not yet, have none.
    """

    def __init__(self, model: TransformerVQ) -> None:
        self.layers: dict[int, LayerHealth] = {}
        self.counted: Tensor | None = None
        layers = enumerate(cast(Iterable[VQAttention], model.layers))
        self._quantizers: dict[int, Quantizer] = {i: layer.quantizer for i, layer in layers if layer.quantizes}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        for i, quantizer in self._quantizers.items():
            self.layers[i] = LayerHealth(quantizer.codebook.detach())
            self._hooks.append(quantizer.register_forward_hook(self._listener(i)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def count_only(self, counted: Tensor) -> None:
        """(B, T) bool: the tokens of the coming call whose keys count."""
        self.counted = counted

    def summary(self) -> dict[str, float]:
        """Flat, as in the class's text."""
        return {f"layer{i}/{name}": x for i, layer in self.layers.items() for name, x in layer.summary().items()}

    def _listener(self, i: int) -> Callable[[nn.Module, tuple[Any, ...], Quantized], None]:
        def listen(quantizer: nn.Module, inputs: tuple[Any, ...], result: Quantized) -> None:
            assert self.counted is not None, "count_only comes before the model's call"
            self.layers[i].add(inputs[0], result, self.counted)

        return listen
