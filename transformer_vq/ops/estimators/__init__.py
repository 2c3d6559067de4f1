"""How a gradient passes a quantized key: every estimator is one function of (k, q, what else it names) -> k̂.

A function's parameters say what it needs: `k`, `q`, and any of `codebook`, `codes`, `noise`, `generator`,
`temperature`, `alpha`; `noise` names its random numbers by row and place, a `generator` draws them in order (noise.py).
To add one: write the function, add its name to the dict below (or name it `module:function` in a config).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from transformer_vq.ops.estimators.error import diveq, diveq_noise, nsvq, sf_diveq
from transformer_vq.ops.estimators.noise import Source, as_generator, as_noise
from transformer_vq.ops.estimators.rows import (
    random_rotation,
    reflection,
    rotation,
    rotation_centred,
    rotation_tangent,
    rotation_unscaled,
    scale,
    ste,
)
from transformer_vq.ops.estimators.soft import gumbel, ibq, reinmax
from transformer_vq.ops.estimators.twice import exact, hessian
from transformer_vq.ops.resolve import resolve

Estimator = Callable[..., Tensor]

ESTIMATORS: dict[str, Estimator] = {
    "ste": ste,
    "rotation": rotation,
    "rotation_unscaled": rotation_unscaled,
    "rotation_tangent": rotation_tangent,
    "rotation_centred": rotation_centred,
    "scale": scale,
    "reflection": reflection,
    "random_rotation": random_rotation,
    "diveq": diveq,
    "gumbel": gumbel,
    "reinmax": reinmax,
    "ibq": ibq,
}
"""Forward bitwise a code: attention may use them."""

IMAGE_ESTIMATORS: dict[str, Estimator] = {"nsvq": nsvq, "diveq_noise": diveq_noise, "sf_diveq": sf_diveq}
"""Forward off the codebook in training: for decoders that take any vector. Use q itself in evaluation."""

LOSS_ESTIMATORS: dict[str, Estimator] = {"exact": exact, "hessian": hessian}
"""Functions of (k, q, loss) that run the decoder twice."""

TAKE_A_SEED = ("random_rotation", "gumbel", *IMAGE_ESTIMATORS)
"""Their `generator` may be a seed or `Noise`; to others, a user's own among them, a generator is given."""

_OFF = "its value is off the codebook in training, and a key in the cache is known by its code alone"
_TWICE = "it runs the decoder a second time, which only the image models have"
IMAGE_ONLY: dict[str, str] = dict.fromkeys(IMAGE_ESTIMATORS, _OFF) | dict.fromkeys(LOSS_ESTIMATORS, _TWICE)
"""Names that are refused on keys, and why."""


def names() -> list[str]:
    """Every registered estimator that keys may use."""
    return list(ESTIMATORS)


def register(name: str, estimator: Estimator) -> None:
    """Add an estimator under a new name.  Raises ValueError when the name is taken."""
    if name in ESTIMATORS or name in IMAGE_ONLY:
        raise ValueError(f"estimator {name!r}: the name is taken")
    ESTIMATORS[name] = estimator


def uses(name: str, argument: str) -> bool:
    """Whether the estimator takes `argument`, like "generator"."""
    return argument in inspect.signature(resolve(name, ESTIMATORS | IMAGE_ESTIMATORS, "estimator")).parameters


def draws(name: str) -> bool:
    """Whether the estimator has noise."""
    return uses(name, "generator") or uses(name, "noise")


def check(name: str, on_keys: bool = True) -> None:
    """Raises ValueError unless `name` is an estimator: one of the tables or `module:function`, and fit for keys."""
    if name in IMAGE_ONLY:
        if on_keys:
            raise ValueError(
                f"estimator {name}: for images only; {IMAGE_ONLY[name]}. Keys may use {', '.join(names())}"
            )
        return
    resolve(name, ESTIMATORS, "estimator")


def apply(
    name: str,
    k: Tensor,
    q: Tensor,
    codebook: Tensor | None = None,
    codes: Tensor | None = None,
    generator: Source | None = None,
    temperature: float = 1.0,
    alpha: float = 1.0,
) -> Tensor:
    """k̂ of the named estimator: forward bitwise q, gradient of the keys (and of q or the codebook) by its rule.

    k, q (..., K), q the codebook row of each key; codebook (H, S, K) and codes (B, H, T) where the estimator uses them;
    generator: on the device of k, or a () int64 tensor as seed, or a `Noise` that names each token (see noise.py),
    where the estimator has noise;
    temperature is that of the softmax family, alpha that of `diveq`.
    name: a key of `ESTIMATORS` or `IMAGE_ESTIMATORS` (whose forward is not q), or `module:function`.
    Raises ValueError for an unknown name, unequal shapes, or a missing argument that the estimator needs.
    """
    if name in LOSS_ESTIMATORS:
        raise ValueError(f"estimator {name}: {IMAGE_ONLY[name]}; call estimators.{name}(k, q, loss)")
    estimator = resolve(name, ESTIMATORS | IMAGE_ESTIMATORS, "estimator")
    if k.shape != q.shape:
        raise ValueError(f"estimator {name}: k {tuple(k.shape)} and q {tuple(q.shape)} must have one shape")
    offered: dict[str, Any] = {
        "codebook": codebook,
        "codes": codes,
        "generator": generator,
        "noise": generator,
        "temperature": temperature,
        "alpha": alpha,
    }
    chosen: dict[str, Any] = {}
    for parameter in list(inspect.signature(estimator).parameters.values())[2:]:
        chosen[parameter.name] = offered.get(parameter.name, parameter.default)
        if parameter.name == "generator" and name not in TAKE_A_SEED:
            chosen["generator"] = as_generator(generator, k.device)
        if parameter.name == "noise" and generator is not None:
            chosen["noise"] = as_noise(generator, k)
        if chosen[parameter.name] is None and parameter.default is parameter.empty:
            raise ValueError(f"estimator {name}: needs {parameter.name}")
    k_hat: Tensor = estimator(k, q, **chosen)
    return k_hat
