"""The loss of a row of text when one of its keys has another code, and everything else is as it is.

Rows of a batch are independent: a call of the model answers for as many rows as it reads, each with a key of its own.

Axes:  B rows, one key each  H heads  T length  S codes
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformer_vq.bench.doctor import Batch
from transformer_vq.models import TransformerVQ
from transformer_vq.models.attention import VQAttention
from transformer_vq.quantizers import Quantized
from transformer_vq.quantizers.nearest import NearestQuantizer
from transformer_vq.quantizers.seeds import seeded

TOKENS = 2**14  # read in a call of the model
LOGITS = 2**25  # held in one

Progress = Callable[[int, int], None]


class Keys(NamedTuple):
    """One key a row of the batch: its head and place, (B) int64 each."""

    heads: Tensor
    places: Tensor


def choose(model: TransformerVQ, batch: Batch, seed: int) -> Keys:
    """A head and a place of each row, uniform."""
    rows, length = batch.tokens.shape
    generator = seeded(seed, 0, "keys to compare gradients at")
    heads = torch.randint(model.config.key_value_heads, (rows,), generator=generator)
    places = torch.randint(length, (rows,), generator=generator)
    return Keys(heads.to(batch.tokens.device), places.to(batch.tokens.device))


def losses(model: TransformerVQ, batch: Batch, rows: Tensor, entering: Tensor | None = None) -> Tensor:
    """Nats of these rows of the batch, (len(rows)) fp64, each summed over the row's labels.

    entering (B, T, D): what enters the first layer, in place of the embeddings of the tokens.
    """
    segments = None if batch.segments is None else batch.segments[rows]
    embedded = None if entering is None else entering[rows]
    x, _, _ = model.features(batch.tokens[rows], segments=segments, embedded=embedded)
    logits = model.logits(x)
    nats = F.cross_entropy(logits.flatten(0, 1), batch.labels[rows].flatten(), ignore_index=-100, reduction="none")
    return nats.view(len(rows), -1).double().sum(1)


@contextmanager
def coded(quantizer: NearestQuantizer, keys: Keys, codes: Tensor, cached: bool = True) -> Iterator[None]:
    """In forward passes in here each row's chosen key has the code (B) that is given, and that code's row.

    cached: False: the row alone, so that the cache knows the key by its own code still.
    """

    def change(module: nn.Module, inputs: tuple[Any, ...], result: Quantized) -> Quantized:
        at = (torch.arange(len(codes), device=codes.device), keys.heads, keys.places)
        taken, quantized = result.codes.clone(), result.quantized.clone()
        if cached:
            taken[at] = codes
        quantized[at] = quantizer.codebook[keys.heads, codes].to(quantized.dtype)
        return result._replace(codes=taken, quantized=quantized)

    handle = quantizer.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def by_definition(layer: VQAttention) -> Iterator[None]:
    """The layer goes token by token in here: the backend that reads a row in the window and a code beyond, exactly so.

    The others may read either where both are the same, and they are wherever a key has the row of its code.
    """
    config = layer.config
    layer.config = config.model_copy(update={"backend": "recurrent"})
    try:
        yield
    finally:
        layer.config = config


def tail_of(model: TransformerVQ, layer: int, batch: Batch) -> tuple[TransformerVQ, Tensor]:
    """The model from a layer on, with its very modules, and what enters that layer, (B, T, D): half of the work."""
    seen: list[Tensor] = []
    hook = model.layers[layer].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        for rows in chunks(len(batch.tokens), rows_at_once(model, batch.tokens.shape[1])):
            losses(model, batch, rows)
    finally:
        hook.remove()
    tail = copy.copy(model)
    tail._modules, tail._parameters = model._modules.copy(), model._parameters.copy()
    tail.layers = nn.ModuleList(list(model.layers)[layer:])
    tail.absolute_scale = None  # it is in what enters
    return tail, torch.cat(seen)


@torch.no_grad()
def losses_by_code(
    model: TransformerVQ,
    layer: int,
    batch: Batch,
    keys: Keys,
    wanted: Tensor,
    through: str = "everything",
    progress: Progress | None = None,
) -> Tensor:
    """Nats of each row with each code in place of its key's that is wanted (B, S) bool -> (B, S) fp64, else 0."""
    module = cast(VQAttention, model.layers[layer])
    quantizer, cached = cast(NearestQuantizer, module.quantizer), through == "everything"
    found = torch.zeros(wanted.shape, dtype=torch.float64, device=wanted.device)
    rows, codes = wanted.nonzero(as_tuple=True)
    parts = list(chunks(len(rows), rows_at_once(model, batch.tokens.shape[1])))
    tail, entering = tail_of(model, layer, batch)
    for number, part in enumerate(parts):
        mine = rows[part]
        chosen = Keys(keys.heads[mine], keys.places[mine])
        with nullcontext() if cached else by_definition(module), coded(quantizer, chosen, codes[part], cached):
            found[mine, codes[part]] = losses(tail, batch, mine, entering)
        if progress is not None:
            progress(number + 1, len(parts))
    return found


def rows_at_once(model: TransformerVQ, length: int) -> int:
    """How many rows of this length a call reads."""
    vocabulary = model.config.vocab_size or 1
    return max(1, min(TOKENS // length, LOGITS // (length * vocabulary)))


def chunks(count: int, size: int) -> Iterator[Tensor]:
    """0 … count - 1 in order, so many at a time."""
    return iter(torch.arange(count).split(size))
