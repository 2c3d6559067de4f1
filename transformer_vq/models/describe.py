"""What a configuration amounts to, layer by layer: parameters, state, and floating-point operations per token.

Counted on the model itself, built on the meta device (no memory, no weights), so that it cannot drift from the code.
One multiply-add is 2 FLOPs. Per token, forward, what grows with widths; norms, softmax and activations are left out:

    matrices    2 · their weights, short convolutions included
    lookup      2 · Hkv·S·K               distances to every code (vq, simvq; the others project, round, expand)
    position    2 · H·K·(M+1)             xl: the query against every relative position
    window      2 · H·(K+V)·(M+1)         the keys that are seen exactly
    cache       2 · H·(K+V)·S             the means that stand for all older keys
    full        2 · H·(K+V)·(T+1)/2       a layer that keeps every key, on average over a sequence of T tokens

A blockwise pass computes up to L more keys a query than `window` says, which pays off in speed. Training costs about
three times the forward pass.

Axes:   T length  H heads  Hkv key heads  K key width  V value width  S codes  M window
"""

from __future__ import annotations

from typing import Any, cast

import torch

from transformer_vq.config import TransformerVQConfig
from transformer_vq.models.attention import VQAttention
from transformer_vq.models.language_model import TransformerVQ
from transformer_vq.ops.attention import AttentionState, FullState, initial_state, resolve_backend

TRAINING = 3
"""How many times the FLOPs of the forward pass a forward and a backward pass take."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
"""What attention gets, by `train.precision`."""


def describe(config: TransformerVQConfig, length: int) -> dict[str, Any]:
    """Layers one by one, and totals; `length` is T, at which a state that grows with the text is measured.

    -> {"layers": [{"layer", "kind", …the quantizer's settings…, "parameters", "state_numbers", "state_bytes",
    "state_grows", "flops_per_token"}, …], "parameters", "state_numbers", "state_bytes", "state_grows",
    "flops_per_token", "length", "embedding_parameters", "head_parameters"}.  The state is that of one stream, in fp32.
    """
    with torch.device("meta"):
        model = TransformerVQ(config)
    layers = []
    for i, (module, settings) in enumerate(zip(model.layers, config.layer_quantizers(), strict=True)):
        layer = cast(VQAttention, module)
        size = getattr(settings, "size", None)
        kept = [*layer_state(layer, size or 1, length), *conv_state(layer)]
        layers.append(
            {
                "layer": i,
                **settings.model_dump(),
                "codes": size,
                "parameters": _size(layer.parameters()),
                "state_numbers": sum(x.numel() for x in kept),
                "state_bytes": sum(x.numel() * x.element_size() for x in kept),
                "state_grows": keeps_every_key(layer),
                "flops_per_token": layer_flops(layer, size or 0, length),
            }
        )
    total = {name: sum(layer[name] for layer in layers) for name in ("state_numbers", "state_bytes", "flops_per_token")}
    head = config.vocab_size * config.width  # type: ignore[operator]  # TransformerVQ has refused None
    return {
        "layers": layers,
        "parameters": _size(model.parameters()),
        "embedding_parameters": model.embedding.weight.numel(),
        "head_parameters": 0 if config.tied_embedding else _size(model.head.parameters()),
        **total,
        "flops_per_token": total["flops_per_token"] + 2 * head,
        "state_grows": any(layer["state_grows"] for layer in layers),
        "length": length,
    }


def attention_backend(
    config: TransformerVQConfig, device: torch.device | str, length: int, precision: str, context: int = 1
) -> tuple[str, str]:
    """The backend of training on `length` tokens in `train.precision`, over `context` processes, and why."""
    widths = config.key_dim, config.value_dim
    return resolve_backend(config.backend, device, length // context, *widths, DTYPES[precision], context > 1)


def keeps_every_key(layer: VQAttention) -> bool:
    """True for full attention; a quantizer with a start_step is described as it is from that step on."""
    return layer.kind == "none" and layer.config.cache


def layer_state(layer: VQAttention, size: int, length: int) -> AttentionState | FullState:
    """What one stream carries through the layer of `size` codes after `length` tokens: fp32, on the meta device."""
    config = layer.config
    heads, widths = config.key_value_heads, (config.key_dim, config.value_dim)
    if keeps_every_key(layer):
        with torch.device("meta"):
            k, v = (torch.empty(1, heads, length, width) for width in widths)
            one = torch.empty(1, dtype=torch.int64)
            return FullState(k, v, torch.empty(1, length, dtype=torch.bool), one, one)
    return initial_state(1, heads, *widths, size, config.window, torch.float32, "meta")


def conv_state(layer: VQAttention) -> list[torch.Tensor]:
    """The inputs that one stream carries for the layer's short convolution."""
    if layer.conv is None:
        return []
    return [torch.empty(1, layer.conv.reach, layer.config.width, dtype=torch.float32, device="meta")]


def layer_flops(layer: VQAttention, size: int, length: int) -> int:
    """Forward FLOPs per token of one layer of `size` codes, as listed at the top."""
    config = layer.config
    both = config.key_dim + config.value_dim
    exact = config.window + 1
    per_call = ("position.", "quantizer.") if layer.kind in ("vq", "simvq") else ("position.",)  # whatever the tokens
    flops = sum(2 * p.numel() for name, p in layer.named_parameters() if p.ndim > 1 and not name.startswith(per_call))
    if config.position == "xl":
        flops += 2 * config.heads * config.key_dim * exact
    if keeps_every_key(layer):
        return flops + config.heads * both * (length + 1)
    flops += 2 * config.heads * both * exact
    if layer.kind != "none":
        if layer.kind in ("vq", "simvq"):
            flops += 2 * config.key_value_heads * size * config.key_dim
        if config.cache:
            flops += 2 * config.heads * both * size
    return flops


def _size(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)
