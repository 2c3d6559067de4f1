"""Linear maps of a model, whose products are ours where those are quicker (ops/linear.py).

Layers are PyTorch's own, so that libraries find, replace and wrap them as they know them.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module

from transformer_vq.ops.linear import by_library, possible

HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


def mapped(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x): (..., K) -> (..., N)."""
    if type(layer) is nn.Linear and possible(x, layer.weight, layer.bias) and untouched(layer):
        return by_library(x, layer.weight, layer.bias)
    y: Tensor = layer(x)
    return y


def untouched(layer: nn.Linear) -> bool:
    """Whether calling it would do nothing but the product."""
    return "forward" not in vars(layer) and not any(
        getattr(layer, f"_{name}") or getattr(module, f"_global_{name}") for name in HOOKS
    )
