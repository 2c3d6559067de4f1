"""Where the noise of an estimator comes from: a generator, or a seed that torch.compile can carry in its graph.

torch.compile breaks its graph at any draw from a generator (torch 2.13). An estimator's `generator` may therefore be a
() int64 tensor too: the draws are those of a new generator with that seed, made inside of an operator.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Source: TypeAlias = torch.Generator | Tensor


def normal(like: Tensor, source: Source) -> Tensor:
    """Standard normal fp32 numbers of the shape and on the device of `like`."""
    if isinstance(source, Tensor):
        return _seeded_normal(source, like.detach())
    return torch.randn(like.shape, generator=source, device=like.device, dtype=torch.float32)


def uniform(like: Tensor, source: Source) -> Tensor:
    """The same, uniform in [0, 1)."""
    if isinstance(source, Tensor):
        return _seeded_uniform(source, like.detach())
    return torch.rand(like.shape, generator=source, device=like.device, dtype=torch.float32)


def seed_of(source: Source) -> Tensor:
    """One draw, () int64: a seed for noise that is made later and piece by piece."""
    if isinstance(source, Tensor):
        return _seed(source)
    return torch.randint(2**62, (), generator=source, device=source.device)


def as_generator(source: Source | None, device: torch.device) -> torch.Generator | None:
    """A generator, for functions that know nothing of seeds."""
    return _generator(source, device) if isinstance(source, Tensor) else source


def _generator(seed: Tensor, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(seed))


@torch.library.custom_op("transformer_vq::seeded_normal", mutates_args=())
def _seeded_normal(seed: Tensor, like: Tensor) -> Tensor:
    return normal(like, _generator(seed, like.device))


@torch.library.custom_op("transformer_vq::seeded_uniform", mutates_args=())
def _seeded_uniform(seed: Tensor, like: Tensor) -> Tensor:
    return uniform(like, _generator(seed, like.device))


@torch.library.custom_op("transformer_vq::seed", mutates_args=())
def _seed(seed: Tensor) -> Tensor:
    return seed_of(_generator(seed, seed.device))


@_seeded_normal.register_fake
def _(seed: Tensor, like: Tensor) -> Tensor:
    return torch.empty(like.shape, device=like.device, dtype=torch.float32)


@_seeded_uniform.register_fake
def _(seed: Tensor, like: Tensor) -> Tensor:
    return torch.empty(like.shape, device=like.device, dtype=torch.float32)


@_seed.register_fake
def _(seed: Tensor) -> Tensor:
    return torch.empty_like(seed)
