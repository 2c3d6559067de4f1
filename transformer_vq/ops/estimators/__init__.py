"""How a gradient passes a quantized key: every estimator is one function of (k, q, what else it names) -> k̂.

A function's parameters say what it needs: `k`, `q`, and any of `codebook`, `codes`, `generator`, `temperature`.
To add one: write the function, add its name to the dict below (or name it `module:function` in a config).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transformer_vq.ops.estimators.rows import rotation, ste
from transformer_vq.ops.resolve import resolve

Estimator = Callable[..., Tensor]

ESTIMATORS: dict[str, Estimator] = {
    "ste": ste,
    "rotation": rotation,
}


def names() -> list[str]:
    """Every registered estimator."""
    return list(ESTIMATORS)


def register(name: str, estimator: Estimator) -> None:
    """Add an estimator under a new name.  Raises ValueError when the name is taken."""
    if name in ESTIMATORS:
        raise ValueError(f"estimator {name!r}: the name is taken")
    ESTIMATORS[name] = estimator


def apply(
    name: str,
    k: Tensor,
    q: Tensor,
    codebook: Tensor | None = None,
    codes: Tensor | None = None,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """k̂ of the named estimator: forward bitwise q, gradient of the keys (and of q or the codebook) by its rule.

    k, q (..., K), q the codebook row of each key; codebook (H, S, K) and codes (B, H, T) where the estimator uses them.
    name: one of `names()` or `module:function`.
    Raises ValueError for an unknown name, unequal shapes, or a missing argument that the estimator needs.
    """
    estimator = resolve(name, ESTIMATORS, "estimator")
    if k.shape != q.shape:
        raise ValueError(f"estimator {name}: k {tuple(k.shape)} and q {tuple(q.shape)} must have one shape")
    offered = {"codebook": codebook, "codes": codes, "generator": generator, "temperature": temperature}
    chosen: dict[str, Any] = {}
    for parameter in list(inspect.signature(estimator).parameters.values())[2:]:
        chosen[parameter.name] = offered.get(parameter.name)
        if chosen[parameter.name] is None and parameter.default is parameter.empty:
            raise ValueError(f"estimator {name}: needs {parameter.name}")
    return estimator(k, q, **chosen)
