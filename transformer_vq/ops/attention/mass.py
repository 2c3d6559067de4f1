"""Where attention goes: what a query pays to itself, to the window before it, and to all that lies beyond.

    self     distance 0
    window   distances 1 … M, exact keys
    beyond   older than M. Through a cache that is Σ_s n_s exp(q·c_s) over the same denominator, by code

The probabilities are those of the definition (quadratic.py), in the type of the arguments or fp32; O(T·(S+M+T)), so a
long text is read in short calls, the state carried.

Axes:  B batch  H query heads  Hkv key heads  T length  P past keys  K key width  S codes  M window
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from transformer_vq.ops.attention.arguments import Arguments
from transformer_vq.ops.attention.call import prepare
from transformer_vq.ops.attention.full import FullState, by_distance, empty, runs
from transformer_vq.ops.attention.quadratic import places, probabilities
from transformer_vq.ops.attention.rotary import rotate


class Mass(NamedTuple):
    """Shares of each query's attention; the first three sum to one."""

    itself: Tensor
    """(B, H, T)."""
    window: Tensor
    """(B, H, T)."""
    beyond: Tensor
    """(B, H, T)."""
    by_code: Tensor
    """(B, Hkv, S): of `beyond`, summed over the queries and query heads; S = 0 where keys have no code."""


@torch.no_grad()
def attention_mass(arguments: Arguments) -> Mass:
    """The arguments of `vq_attention`, padding apart, whose values are not read -> `Mass`.

    Raises ValueError for a mask, and where shapes do not fit together.
    """
    if arguments.mask is not None:
        raise ValueError("attention_mass: takes no mask; leave the padding out")
    call = prepare(arguments).wide()
    M, T = call.window, call.q.shape[3]
    p_cached, p = probabilities(call)
    i, j = places(M, T, p.device)
    distance = i - j
    far = p.masked_fill(distance <= M, 0)
    cached = p_cached.sum((2, 3))
    if call.cache:
        cached = cached.scatter_add(2, call.codes_with_carried, far.sum((2, 3)))
    near = p.masked_fill((distance < 1) | (distance > M), 0).sum(-1)
    itself, beyond = p.masked_fill(distance != 0, 0).sum(-1), p_cached.sum(-1) + far.sum(-1)
    return Mass(itself.flatten(1, 2), near.flatten(1, 2), beyond.flatten(1, 2), cached)


@torch.no_grad()
def full_mass(
    q: Tensor,
    k: Tensor,
    window: int,
    bias: Tensor | None = None,
    rotary: Tensor | None = None,
    state: FullState | None = None,
    segments: Tensor | None = None,
) -> Mass:
    """Arguments of `full_attention` without values and padding: q (B, H, T, K), k (B, Hkv, T, K) -> `Mass`."""
    (B, H, T, _), Hkv = q.shape, k.shape[1]
    past = empty(k, k) if state is None else state
    now = torch.ones(B, T, dtype=torch.bool, device=q.device)
    query_run, _ = runs(past, now, segments)
    key_run = torch.cat([past.alive.long() - 1, query_run], dim=1)
    rank = torch.cat([past.alive, now], dim=1).cumsum(1) - 1
    query_rank = rank[:, -T:]
    k = torch.cat([past.k.to(k.dtype), k], dim=2)
    if rotary is not None:
        q, k = rotate(q, query_rank[:, None], rotary), rotate(k, rank[:, None], rotary)
    logits = q @ k.repeat_interleave(H // Hkv, dim=1).mT
    distance = query_rank[:, :, None] - rank[:, None]  # (B, T, P+T)
    if bias is not None:
        logits = logits + by_distance(bias, distance)
    order = torch.arange(k.shape[2], device=q.device)
    seen = (query_run[:, :, None] == key_run[:, None]) & (order <= order[-T:, None])
    p = logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    distance = distance[:, None]
    itself, near = distance == 0, (distance > 0) & (distance <= window)
    shares = [p.masked_fill(~chosen, 0).sum(-1) for chosen in (itself, near, ~(itself | near))]
    return Mass(shares[0], shares[1], shares[2], p.new_zeros(B, Hkv, 0))
