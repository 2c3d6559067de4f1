"""What each part of a model keeps and needs in memory, found by running it on fake tensors: no memory, no numbers.

The parts are those of the real model, so this cannot drift from the code. Layers with equal settings are run once.

Axes:  B batch  T length  D width
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transformer_vq.config import TransformerVQConfig
from transformer_vq.models.attention import Carried, Context, VQAttention
from transformer_vq.models.decoding import Decoder
from transformer_vq.models.describe import attention_backend
from transformer_vq.models.language_model import DECODED, DROPPED, TransformerVQ
from transformer_vq.models.state import ModelState
from transformer_vq.ops import inside
from transformer_vq.ops.attention import FullState, initial_state, scratch
from transformer_vq.ops.attention.choice import FUSED
from transformer_vq.ops.inside import kernels_run
from transformer_vq.ops.kernels.device import rehearsal
from transformer_vq.ops.live_bytes import LiveBytes, counting, fill
from transformer_vq.quantizers import Quantizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Part:
    """Bytes of one layer, or of norm, head and loss, in a forward and a backward pass over B rows of T tokens."""

    kept: int
    """From the forward to the backward pass: what autograd saves, the output, the new state."""
    forward: int
    """The most in the forward pass, beyond what was there before it."""
    backward: int
    """The most in the backward pass, likewise: with `kept`, and with the gradients of the part's own parameters."""


@dataclass(frozen=True)
class Training:
    """Bytes of a model in training."""

    parameters: tuple[int, ...]
    """Each layer's, in order; their gradients take as much."""
    outside: int
    """Parameters outside of the layers: embeddings, norm, head."""
    buffers: int
    state: int
    """What one call over B rows hands to the next."""
    embedded: int
    """(B, T, D), what the first layer reads."""
    keys: int
    """(B, Hkv, T, K) of one layer."""
    layers: tuple[Part, ...]
    loss: Part


@dataclass(frozen=True)
class Decoding:
    """Bytes of a model that generates B texts side by side."""

    parameters: int
    """With the buffers, and with what is kept from token to token because it depends on weights alone."""
    state: int
    token: int
    """The most that a call of one token needs beside these; the state after it is in it."""
    prompt: int
    """The most that reading a piece of the prompt needs."""

    @property
    def total(self) -> int:
        """All of it, while the prompt is read."""
        return self.parameters + self.state + max(self.token, self.prompt)

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return {**vars(self), "total": self.total}


def training(
    config: TransformerVQConfig,
    batch: int,
    length: int,
    *,
    precision: str = "fp32",
    past: int = 0,
    retained: bool = False,
    device: str = "cpu",
) -> Training:
    """Of a forward and a backward pass over (batch, length) tokens; `vocab_size` must be set.

    precision: fp32 | bf16 (autocast) | fp64. past: tokens read before, whose state is carried in; 0: none is.
    retained: the backward pass keeps what the forward pass saved. device: cpu | cuda, which chooses the backend.
    """
    model = _hollow(config)
    settings = model.config.layer_quantizers()
    with _fake(model, torch.float64 if precision == "fp64" else torch.float32, config, device, precision) as live:
        carried = DTYPES[precision] if past else None
        found: dict[str, Part] = {}
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            for layer, its in zip(model.layers, settings, strict=True):
                if (key := its.model_dump_json()) not in found:
                    state = None if carried is None else _carried(cast(VQAttention, layer), batch, past, carried)
                    found[key] = _layer(model, cast(VQAttention, layer), (batch, length), state, live, retained)
            loss = _loss(model, (batch, length), live, retained)
        left = _state(model, batch, past + length, DTYPES[precision])
        return Training(
            parameters=tuple(_bytes(layer.parameters()) for layer in model.layers),
            outside=_bytes(model.parameters()) - sum(_bytes(layer.parameters()) for layer in model.layers),
            buffers=_bytes(model.buffers()),
            state=_bytes(_tensors(left)),
            embedded=batch * length * config.width * next(model.parameters()).itemsize,
            keys=batch * length * config.key_value_heads * config.key_dim * DTYPES[precision].itemsize,
            layers=tuple(found[its.model_dump_json()] for its in settings),
            loss=loss,
        )


def decoding(
    config: TransformerVQConfig, batch: int, length: int, piece: int, *, dtype: str = "fp32", device: str = "cpu"
) -> Decoding:
    """Of a frozen model after `length` tokens of `batch` texts, read in pieces; in that type, without autocast.

    As `generate` reads them: on a GPU with kernels, tokens go through a ring that is written in place.
    """
    settings = config.layer_quantizers()
    found: dict[str, _Read] = {}
    for its in settings:
        if (key := its.model_dump_json()) not in found:
            alone = config.model_copy(update={"layers": 1, "per_layer": None, "quantizer": its})
            found[key] = _read(alone, batch, length, piece, dtype, device)
    layers = [found[its.model_dump_json()] for its in settings]
    opened = sum(layer.opened[0] for layer in layers)
    return Decoding(
        parameters=layers[0].outside + sum(layer.weights for layer in layers),
        state=_bytes(torch.empty(3, batch, dtype=torch.int64, device="meta")) + sum(layer.state for layer in layers),
        token=max(_most(layer.opened for layer in layers), opened + _most(layer.token for layer in layers)),
        prompt=_most(layer.prompt for layer in layers),
    )


@dataclass(frozen=True)
class _Read:
    """Bytes of a model of one layer that reads. A call is what it leaves behind, and the most that it needs."""

    outside: int
    """Parameters and buffers outside of the layer."""
    weights: int
    """The layer's own, and what depends on them alone."""
    state: int
    opened: tuple[int, int]
    """The state made ready for tokens one by one."""
    token: tuple[int, int]
    """From then on."""
    prompt: tuple[int, int]


def _most(calls: Iterable[tuple[int, int]]) -> int:
    """Of layers one after another, each beside what those before it left."""
    before = most = 0
    for left, needed in calls:
        before, most = before + left, max(most, before + needed)
    return most


def _read(config: TransformerVQConfig, batch: int, length: int, piece: int, dtype: str, device: str) -> _Read:
    """Of a model of one layer, head included; see `decoding`."""
    model, kind = _hollow(config).eval(), DTYPES[dtype]
    with _fake(model, kind, config, device, dtype) as live, torch.no_grad():
        outside = _bytes(_tensors(model)) - _bytes(_tensors(model.layers))
        token, prompt = (torch.empty(batch, n, dtype=torch.int64) for n in (1, piece))
        state = _state(model, batch, length, kind)
        start = live.now
        with model.frozen(), _steps(model, config, token, device) as decoder:
            own = live.now - start

            def call(work: Callable[[], Any]) -> tuple[Any, tuple[int, int]]:
                live.peak = start = live.now
                made = work()
                return made, (live.now - start, live.peak - start)

            def read(tokens: Tensor, state: ModelState) -> tuple[Any, ...]:
                short = decoder if tokens is token else None
                x, *left = (short or model.features)(tokens, state)
                if tokens is token:
                    model.logits(x)
                return tuple(left)

            now, opened = (state, (0, 0)) if decoder is None else call(lambda: decoder.open(state, token))
            return _Read(
                outside=outside,
                weights=_bytes(_tensors(model.layers)) + own,
                state=_bytes(x for part in (*state.layers, state.inputs) for x in part),
                opened=opened,
                token=call(lambda: read(token, now))[1],
                prompt=call(lambda: read(prompt, state))[1],
            )


@contextmanager
def _steps(model: TransformerVQ, config: TransformerVQConfig, token: Tensor, device: str) -> Iterator[Decoder | None]:
    """What reads tokens one by one in `generate`; None: the layers themselves."""
    narrow = max(config.key_dim, config.value_dim) <= FUSED
    if not (device == "cuda" and config.backend == "auto" and narrow and kernels_run()):
        yield model.decoder(token) if config.backend in DECODED else None
        return
    decoder = Decoder(model.embedding, model.absolute_scale, model.layers, model.norm, in_place=True)
    with rehearsal():
        yield decoder if decoder.useful else None


def _hollow(config: TransformerVQConfig) -> TransformerVQ:
    """The model on the meta device, its quantizers as after their start: nothing waits for keys.

    Its backend is one that fake tensors on a CPU may name; what the real one needs, `scratch` tells.
    """
    over = {"start_step": 0, "init": "normal"}
    layers = [q.model_dump() for q in config.layer_quantizers()]
    started = {str(i): {k: over.get(k, v) for k, v in its.items()} for i, its in enumerate(layers)}
    with torch.device("meta"):
        return TransformerVQ(config.model_copy(update={"per_layer": started, "backend": "auto"}))


@contextmanager
def _fake(
    model: TransformerVQ, dtype: torch.dtype, config: TransformerVQConfig, device: str, precision: str
) -> Iterator[LiveBytes]:
    """Fake tensors in place of parameters and buffers, and the count of what is alive beside them."""
    model.to(dtype)  # it says which buffers have a type of their own
    attention = scratch.inside(lambda tokens: attention_backend(config, device, tokens, precision)[0], device)
    with counting(attention | inside.inside(device)) as live:
        fill(model)
        yield live


def _layer(
    model: TransformerVQ,
    layer: VQAttention,
    shape: tuple[int, int],
    before: Carried | None,
    live: LiveBytes,
    retained: bool,
) -> Part:
    """Run one layer forward and backward."""
    config, (B, T) = model.config, shape
    x = torch.empty(B, T, config.width, dtype=next(layer.parameters()).dtype, requires_grad=True)
    names = (
        torch.empty(shape, dtype=torch.int64) if any(getattr(config, f"dropout_{what}") for what in DROPPED) else None
    )
    context = Context(None, None, torch.empty(B, dtype=torch.int64), torch.empty(shape, dtype=torch.int64), names)
    before = before or Carried(None, None)
    live.peak = start = live.now
    if model.checkpoint_activations:
        y, after, quantized = checkpoint(layer, x, context, before, use_reentrant=False)
    else:
        y, after, quantized = layer(x, context, before)
    forward, kept = live.peak - start, live.now - start
    live.peak = live.now
    ends = [end for end in (y, quantized.loss) if end.requires_grad]
    torch.autograd.backward(ends, [torch.empty_like(end) for end in ends], retained)
    backward = live.peak - start
    del y, after, quantized, ends
    _forget(layer)
    return Part(kept, forward, backward)


def _loss(model: TransformerVQ, shape: tuple[int, int], live: LiveBytes, retained: bool) -> Part:
    """Run norm, head and loss forward and backward."""
    x = torch.empty(*shape, model.config.width, dtype=model.embedding.weight.dtype, requires_grad=True)
    labels = torch.empty(shape, dtype=torch.int64)
    live.peak = start = live.now
    loss = model._nats(model.norm(x).flatten(0, 1), labels.flatten())
    forward, kept = live.peak - start, live.now - start
    live.peak = live.now
    loss.backward(retain_graph=retained)
    backward = live.peak - start
    del loss
    _forget(model)
    return Part(kept, forward, backward)


def _forget(module: nn.Module) -> None:
    """Gradients, and what quantizers collected: the next part starts without them."""
    module.zero_grad(set_to_none=True)
    for inner in module.modules():
        if isinstance(inner, Quantizer):
            inner.discard_codebook_statistics()


def _carried(layer: VQAttention, batch: int, length: int, dtype: torch.dtype) -> Carried:
    """What the layer carries after `length` tokens, keys and values of this type."""
    config = layer.config
    heads, widths, wide = config.key_value_heads, (config.key_dim, config.value_dim), next(layer.parameters()).dtype
    inputs = None if layer.conv is None else torch.empty(batch, layer.conv.reach, config.width, dtype=wide)
    if layer.keeps_every_key:
        one = torch.empty(batch, dtype=torch.int64)
        k, v = (torch.empty(batch, heads, length, width, dtype=dtype) for width in widths)
        return Carried(FullState(k, v, torch.empty(batch, length, dtype=torch.bool), one, one), inputs)
    codes = layer.quantizer.codebook.shape[1] if layer.quantizes else 1
    return Carried(initial_state(batch, heads, *widths, codes, config.window, dtype, "cpu"), inputs)


def _state(model: TransformerVQ, batch: int, length: int, dtype: torch.dtype) -> ModelState:
    carried = [_carried(cast(VQAttention, layer), batch, length, dtype) for layer in model.layers]
    one = torch.empty(batch, dtype=torch.int64)
    inputs = tuple(c.inputs for c in carried if c.inputs is not None)
    layers = tuple(c.attention for c in carried if c.attention is not None)
    return ModelState(layers, one, one, one, inputs)


def _tensors(x: ModelState | nn.Module) -> Iterator[Tensor]:
    if isinstance(x, nn.Module):
        yield from (*x.parameters(), *x.buffers())
    else:
        for layer in x.layers:
            yield from layer
        yield from x[1:4]
        yield from x.inputs


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(x.nbytes for x in tensors)
