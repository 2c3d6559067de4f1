"""Cross-entropy of a linear head over a large vocabulary, which never holds all logits.

torch has a chunked form of it from 2.13 on, which computes its gradients in the forward pass; it is taken where it can
be. Elsewhere (older torch, inside a compiled graph) pieces are recomputed in the backward pass.

Axes:   N predictions  D width  V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from transformer_vq.ops.linear import linear

HELD = 2**24
"""So many logits are held at once, 64 MiB in fp32."""


def linear_logits(x: Tensor, weight: Tensor, bias: Tensor, scale: float) -> Tensor:
    """scale · (x Wᵀ + b): (..., D) -> (..., V), fp32 or wider; the product is in the tensors' (or autocast's) type."""
    logits = linear(x, weight, bias)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale


def summed_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor, scale: float, labels: Tensor, ignored: int = -100
) -> Tensor:
    """Σ over labels of −log softmax(linear_logits)[label], in nats: x (N, D), W (V, D), b (V), labels (N,) -> ().

    A label `ignored` does not count. The result is fp32 or wider; up to HELD logits it is bit for bit that of
    `F.cross_entropy` on all of them.
    """
    if len(labels) * len(weight) <= HELD:
        return _nats(x, weight, bias, scale, labels, ignored)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    plain = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    if options is not None and plain and not torch.compiler.is_compiling():
        return F.linear_cross_entropy(
            x * scale,
            weight,
            labels,
            linear_bias=bias * scale,
            reduction="sum",
            ignore_index=ignored,
            options=options(),
        )
    rows = max(1, HELD // len(weight))
    pieces = [
        checkpoint(_nats, a, weight, bias, scale, b, ignored, use_reentrant=False)
        for a, b in zip(x.split(rows), labels.split(rows), strict=True)
    ]
    return torch.stack(pieces).sum()


def _nats(x: Tensor, weight: Tensor, bias: Tensor, scale: float, labels: Tensor, ignored: int) -> Tensor:
    logits = linear_logits(x, weight, bias, scale)
    return F.cross_entropy(logits, labels, ignore_index=ignored, reduction="sum")
