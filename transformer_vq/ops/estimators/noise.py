"""Where the noise of an estimator comes from: counters that name each token, a seed, or a generator.

An estimator that takes `noise` is given a `Noise`, whose numbers follow from (seed, layer, step, row of the batch,
place in the row): the same for every micro-batch size and number of processes, and torch.compile keeps one graph. The
package's own take any of the three as `generator`. A user's function with a parameter `generator` gets a
torch.Generator: its draws depend on how a batch is cut, and break the graph.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from transformer_vq.ops import counter


class Noise(NamedTuple):
    """Names for random numbers; see ops/counter.py."""

    seed: Tensor
    """() int64, on the CPU: what is common to all rows."""
    tokens: Tensor
    """(B, T) int64 for keys (B, H, T, K), else (...) for keys (..., K): the state of each token."""


Source: TypeAlias = torch.Generator | Tensor | Noise


def named(seed: Tensor, first_row: Tensor, first_place: Tensor, like: Tensor, mask: Tensor | None = None) -> Noise:
    """Noise of keys `like` (B, H, T, K): rows first_row, first_row + 1, ... and places from first_place on, both ().

    mask (B, T), True where a token is real: padding does not count, so that it does not shift the noise of others.
    """
    B, T = like.shape[0], like.shape[-2]
    rows = first_row + torch.arange(B, device=like.device)
    places = torch.arange(T, device=like.device) if mask is None else (mask.cumsum(1) - 1).clamp_min(0)
    return Noise(seed, counter.token_states(seed, rows, first_place + places))


def as_noise(source: Source, k: Tensor) -> Noise:
    """Names for keys k (B, H, T, K) or (..., K): a seed () int64, or a draw from a generator, names them from 0 on."""
    if isinstance(source, Noise):
        return source
    seed = source
    if isinstance(source, torch.Generator):
        seed = torch.randint(2**62, (), generator=source, device=source.device)
    assert isinstance(seed, Tensor)
    zero = torch.zeros((), dtype=torch.int64, device=k.device)
    if k.dim() == 4:
        return named(seed, zero, zero, k)
    count = k.shape[:-1].numel()
    tokens = counter.token_states(seed, zero[None], torch.arange(count, device=k.device))
    return Noise(seed, tokens.view(k.shape[:-1]))


def normal(k: Tensor, source: Source) -> Tensor:
    """Standard normal fp32 numbers of the shape and on the device of keys k."""
    if isinstance(source, torch.Generator):
        return torch.randn(k.shape, generator=source, device=k.device, dtype=torch.float32)
    return counter.normal(_bits(k, as_noise(source, k)))


def uniform(k: Tensor, source: Source) -> Tensor:
    """The same, uniform in (0, 1)."""
    if isinstance(source, torch.Generator):
        return torch.rand(k.shape, generator=source, device=k.device, dtype=torch.float32)
    return counter.uniform(_bits(k, as_noise(source, k)))


def uniform_per_code(codebook: Tensor, source: Source) -> Tensor:
    """Of the shape of a codebook (H, S, K), uniform in (0, 1): from the seed alone, so common to all rows of a step."""
    return uniform(codebook, source.seed if isinstance(source, Noise) else source)


def as_generator(source: Source | None, device: torch.device) -> torch.Generator | None:
    """A generator, for functions that know no names: seeded by the first token's, so that micro-batches differ."""
    if source is None or isinstance(source, torch.Generator):
        return source
    seed = source
    if isinstance(source, Noise):
        seed = source.tokens.flatten()[0] if source.tokens.numel() else source.seed
    assert isinstance(seed, Tensor)
    return torch.Generator(device).manual_seed(int(seed))


def _bits(k: Tensor, noise: Noise) -> Tensor:
    """64 bits for each entry of k; within a token, heads and width are counted together."""
    width = torch.arange(k.shape[-1], device=k.device)
    if k.dim() != 4:
        return counter.bits(noise.tokens[..., None], width)
    heads = torch.arange(k.shape[1], device=k.device)[:, None, None] * k.shape[-1]
    return counter.bits(noise.tokens[:, None, :, None], heads + width)
