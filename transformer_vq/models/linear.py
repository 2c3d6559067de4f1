"""Linear maps and embeddings of a model: products are ours where those are quicker (ops/linear.py), and under the
compiler the gradients of rows are added in one order (ops/sums.py).

Layers are PyTorch's own, so that libraries find, replace and wrap them as they know them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module

from transformer_vq.ops.linear import by_library, possible
from transformer_vq.ops.sums import take_rows

HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


def mapped(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x): (..., K) -> (..., N)."""
    if type(layer) is nn.Linear and possible(x, layer.weight, layer.bias) and untouched(layer):
        return by_library(x, layer.weight, layer.bias)
    y: Tensor = layer(x)
    return y


def looked_up(layer: nn.Module, tokens: Tensor) -> Tensor:
    """layer(tokens): (...) int64 -> (..., D)."""
    if torch.compiler.is_compiling() and type(layer) is nn.Embedding and plain(layer) and untouched(layer):
        return take_rows(layer.weight, tokens)
    y: Tensor = layer(tokens)
    return y


def plain(layer: nn.Embedding) -> bool:
    """Whether its rows are its weight's, and their gradients too."""
    return layer.padding_idx is layer.max_norm is None and not (layer.scale_grad_by_freq or layer.sparse)


def untouched(layer: nn.Module) -> bool:
    """Whether calling it would do nothing but what its class does."""
    return "forward" not in vars(layer) and not any(
        getattr(layer, f"_{name}") or getattr(module, f"_global_{name}") for name in HOOKS
    )
