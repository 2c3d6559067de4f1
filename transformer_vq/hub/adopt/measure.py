"""Codebooks from a model's own keys, and what each layer's conversion costs: nothing here is trained.

    damage        bits per byte that one converted layer adds, all others as they came
    output error  ‖converted − original‖ / ‖original‖ of what a layer adds to the residual stream, given the same input
    key error     mean ‖k − c‖ / ‖k‖ of keys and their codes

Axes:  B batch  H key heads  T length  K key width
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from transformer_vq.evaluation.mode import evaluating
from transformer_vq.models import TransformerVQ
from transformer_vq.models.attention import Carried, VQAttention
from transformer_vq.ops.estimators.noise import named
from transformer_vq.quantizers.reservoir import Reservoir
from transformer_vq.quantizers.vq import VectorQuantizer

Batches = Iterable[Tensor]
"""Tokens (B, T) int64, one tensor a forward pass."""


def make_codebooks(original: TransformerVQ, converted: TransformerVQ, batches: Batches) -> int:
    """k-means codebooks of every layer of `converted` that quantizes, from the keys of `original`; the tokens read.

    One pass: a layer's keys are those of the model as it came. At most 64 keys a code are kept, by a hash of their
    place.  Raises ConfigError where there are fewer keys than codes.
    """
    quantizers = {i: layer.quantizer for i, layer in enumerate(layers_of(converted)) if layer.kind == "vq"}
    kept = {i: Reservoir(cast(VectorQuantizer, quantizer).first_keys) for i, quantizer in quantizers.items()}
    row, seen, zero = 0, 0, torch.zeros((), dtype=torch.int64)

    def keep(i: int) -> Callable[..., None]:
        def listen(quantizer: nn.Module, inputs: tuple[Any, ...], result: Any) -> None:
            k = inputs[0]
            first, start = (zero.to(k.device) + n for n in (row, 0))
            kept[i].add(k, None, named(zero.to(k.device), first, start, k))

        return listen

    with evaluating(original) as device, ExitStack() as hooks:
        for i in quantizers:
            handle = layers_of(original)[i].quantizer.register_forward_hook(keep(i))
            hooks.callback(handle.remove)
        for tokens in batches:
            original.features(tokens.to(device))
            row, seen = row + len(tokens), seen + tokens.numel()
    for i, quantizer in quantizers.items():
        cast(VectorQuantizer, quantizer).begin(kept[i].join().clone())
    return seen


def errors_by_layer(original: TransformerVQ, converted: TransformerVQ, batches: Batches) -> list[dict[str, float]]:
    """`output_error` and, where a layer quantizes, `key_error`, layer by layer, each on the original's own inputs."""
    theirs, ours = layers_of(original), layers_of(converted)
    wrong, whole = ([0.0] * len(ours) for _ in range(2))
    keys: list[list[float]] = [[] for _ in ours]

    def compare(i: int) -> Callable[..., None]:
        def listen(layer: nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            x, context = inputs[:2]
            y, _, quantized = ours[i](x, context, Carried(None, None))
            wrong[i] += (y - output[0]).double().square().sum().item()
            whole[i] += (output[0] - x).double().square().sum().item()
            if "relative_error" in quantized.metrics:
                keys[i].append(quantized.metrics["relative_error"].item())

        return listen

    with evaluating(original) as device, evaluating(converted), ExitStack() as hooks:
        for i, layer in enumerate(theirs):
            hooks.callback(layer.register_forward_hook(compare(i)).remove)
        for tokens in batches:
            original.features(tokens.to(device))
    found = []
    for bad, all_, of_keys in zip(wrong, whole, keys, strict=True):
        key_error = {"key_error": sum(of_keys) / len(of_keys)} if of_keys else {}
        found.append({"output_error": (bad / max(all_, 1e-30)) ** 0.5, **key_error})
    return found


def damage_by_layer(
    original: TransformerVQ, converted: TransformerVQ, score: Callable[[TransformerVQ], float]
) -> tuple[float, list[float]]:
    """The score of `original`, and what one converted layer at a time adds to it; lower scores are better."""
    before = score(original)
    damage = []
    for i, layer in enumerate(layers_of(converted)):
        with exchanged(original, {i: layer}):
            damage.append(score(original) - before)
    return before, damage


@contextmanager
def exchanged(model: TransformerVQ, layers: Mapping[int, VQAttention]) -> Iterator[None]:
    """Other layers in a model's places while the block runs."""
    before = {i: layers_of(model)[i] for i in layers}
    try:
        for i, layer in layers.items():
            model.layers[i] = layer
        yield
    finally:
        for i, layer in before.items():
            model.layers[i] = layer


def layers_of(model: TransformerVQ) -> list[VQAttention]:
    """A model's layers, as what they are."""
    return [cast(VQAttention, layer) for layer in model.layers]
