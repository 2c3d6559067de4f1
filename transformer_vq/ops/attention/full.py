"""Full attention over unquantized keys, the baseline: PyTorch's scaled_dot_product_attention.

    logit(i,j) = scale·q_i·k_j + [i−j ≤ M] bias(i, i−j),   j ≤ i

Without bias, segments, mask and state it is one call with `is_causal`. Otherwise a mask of T × (past + T) entries is
materialised, a floating one of that size per head if there is a bias: quadratic memory. Rotary positions are the usual
ones, on the full distance. The state grows with T, unlike that of VQ attention. On a GPU PyTorch's own kernels add up
gradients of queries with atomics, unless `torch.use_deterministic_algorithms(True)` is set.

Axes:  B batch  H query heads  Hkv key heads  T length  P past keys  K, V widths  M window
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_vq.ops.attention.rotary import rotate


class FullState(NamedTuple):
    """Every key and value so far; detached."""

    k: Tensor
    """(B, Hkv, P, K), before rotation."""
    v: Tensor
    """(B, Hkv, P, V)."""
    alive: Tensor
    """(B, P) bool: real, and of the current document."""
    segment: Tensor
    """(B,) int64: id of the last real token's segment."""
    position: Tensor
    """(B,) int64: real tokens read so far."""


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    scale: float | None = None,
    bias: Tensor | None = None,
    rotary: Tensor | None = None,
    state: FullState | None = None,
    segments: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, FullState]:
    """q (B, H, T, K), k (B, Hkv, T, K), v (B, Hkv, T, V) -> o (B, H, T, V) and the state; the rest as `vq_attention`.

    Raises ValueError with the shapes where they do not fit together.
    """
    check(q, k, v, window, bias, rotary)
    B, H, T, _ = q.shape
    Hkv = k.shape[1]
    plain = bias is None and state is None and segments is None and mask is None
    past = empty(k, v) if state is None else state
    now = q.new_ones(B, T, dtype=torch.bool) if mask is None else mask
    if mask is not None:
        q, k, v = (x.masked_fill(~mask[:, None, :, None], 0) for x in (q, k, v))
    query_run, segment = runs(past, now, segments)
    key_run = torch.cat([past.alive.long() - 1, torch.where(now, query_run, -1)], dim=1)  # -1: never seen
    k = torch.cat([past.k, k], dim=2)
    v = torch.cat([past.v, v], dim=2)
    rank = torch.cat([past.alive, now], dim=1).cumsum(1) - 1  # distances count real tokens of the document
    query_rank = rank[:, -T:]

    q_at, k_at = q, k
    if rotary is not None:
        q_at, k_at = rotate(q, query_rank[:, None], rotary), rotate(k, rank[:, None], rotary)
    attn_mask = None
    if not plain:
        P = k.shape[2] - T
        order = torch.arange(P + T, device=q.device)
        seen = (query_run[:, :, None] == key_run[:, None]) & (order <= order[P:, None])
        seen = (seen | (order == order[P:, None]))[:, None]  # padded queries see themselves, so that softmax is finite
        if bias is None:
            attn_mask = seen
        elif state is None and mask is None:  # ranks are positions: no index of every pair is needed
            attn_mask = by_position(bias, T).masked_fill(~seen, float("-inf"))
        else:
            every = bias.expand(B, H, T, window + 1)
            attn_mask = ByRank.apply(every, query_rank, rank)  # type: ignore[no-untyped-call]
            attn_mask = attn_mask.masked_fill(~seen, float("-inf"))
    o = F.scaled_dot_product_attention(
        q_at, k_at, v, attn_mask, is_causal=plain, scale=1.0 if scale is None else scale, enable_gqa=Hkv != H
    )
    if mask is not None:
        o = o.masked_fill(~mask[:, None, :, None], 0)
    alive = key_run == query_run[:, -1:]
    return o, FullState(k.detach(), v.detach(), alive, segment, past.position + now.sum(1))


def empty(k: Tensor, v: Tensor) -> FullState:
    """The state before the first token."""
    zero = torch.zeros(k.shape[0], dtype=torch.int64, device=k.device)
    alive = torch.zeros(k.shape[0], 0, dtype=torch.bool, device=k.device)
    return FullState(k[:, :, :0], v[:, :, :0], alive, zero, zero)


def trim(state: FullState) -> FullState:
    """Without the oldest keys that are dead in every row. Waits for the device: their number is read."""
    dead = int((state.alive.any(0).cumsum(0) == 0).sum())
    return state._replace(k=state.k[:, :, dead:], v=state.v[:, :, dead:], alive=state.alive[:, dead:])


def runs(past: FullState, now: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Document number of each token (B, T), the state's being 0, and the last id (B,). Padding continues."""
    if segments is None:
        return torch.zeros_like(now, dtype=torch.int64), past.segment
    T = now.shape[1]
    last_real = torch.where(now, torch.arange(T, device=now.device), -1).cummax(1).values  # -1: none yet in this call
    ids = segments.gather(1, last_real.clamp_min(0))
    first = segments.gather(1, now.int().argmax(1, keepdim=True))[:, 0]
    ids = torch.where(last_real < 0, torch.where(past.position > 0, past.segment, first)[:, None], ids)
    before = torch.where(past.position > 0, past.segment, first)
    run = (ids != torch.cat([before[:, None], ids[:, :-1]], dim=1)).long().cumsum(1)
    return run, ids[:, -1]


def by_distance(bias: Tensor, distance: Tensor) -> Tensor:
    """bias (B or 1, H, T or 1, M+1) laid out over keys: (B, H, T, P+T), 0 where the distance is not in 0..M."""
    M = bias.shape[-1] - 1
    (B, T, keys), H = distance.shape, bias.shape[1]
    spread = bias.expand(B, H, T, M + 1).gather(-1, distance.clamp(0, M)[:, None].expand(B, H, T, keys))
    inside = ((distance >= 0) & (distance <= M))[:, None]
    return torch.where(inside, spread, 0)


class ByRank(torch.autograd.Function):
    """`by_distance` with gradient, for distances between ranks: gathered both ways, since a query has at most one real
    key at each distance. What autograd would record adds gradients up with atomics.
    """

    @staticmethod
    def forward(ctx: Any, bias: Tensor, query_rank: Tensor, rank: Tensor) -> Tensor:
        """bias (B, H, T, M+1); query_rank (B, T) and rank (B, P+T) count real tokens: what does not count has the rank
        before it, -1 at the start.
        """
        ctx.save_for_backward(query_rank, rank)
        ctx.window = bias.shape[3] - 1
        return by_distance(bias, query_rank[:, :, None] - rank[:, None])

    @staticmethod
    def backward(ctx: Any, d_spread: Tensor) -> tuple[Tensor, None, None]:
        """The real key of a rank is the first that has it. Others have no gradient to pass on: they are masked, or seen
        by nobody but themselves, and then the output is.
        """
        query_rank, rank = ctx.saved_tensors
        wanted = query_rank[:, :, None] - torch.arange(ctx.window + 1, device=rank.device)  # (B, T, M+1)
        key = torch.searchsorted(rank, wanted.flatten(1)).view_as(wanted)
        d_bias = d_spread.gather(3, key[:, None].expand(-1, d_spread.shape[1], -1, -1))
        return d_bias.masked_fill((wanted < 0)[:, None], 0), None, None


def by_position(bias: Tensor, T: int) -> Tensor:
    """`by_distance` where query i and key j stand i − j apart: (B or 1, H, T, T), several times faster.

    Rows of T more columns than the band needs, cut one column shorter: row i slides to the right by i.
    """
    M = bias.shape[-1] - 1
    rows = F.pad(bias.flip(-1).expand(-1, -1, T, -1), (0, T))
    by_key: Tensor = rows.flatten(-2)[..., :-T].unflatten(-1, (T, M + T))
    return by_key[..., M:]


def check(q: Tensor, k: Tensor, v: Tensor, window: int, bias: Tensor | None, rotary: Tensor | None) -> None:
    """Raise ValueError, with the shapes, for arguments that do not belong together."""
    B, H, T, K = q.shape
    if k.shape != (B, k.shape[1], T, K) or v.shape[:3] != k.shape[:3] or H % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if bias is not None and (
        bias.shape[0] not in (1, B) or bias.shape[1] != H or bias.shape[2] not in (1, T) or bias.shape[3] != window + 1
    ):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it needs ({B} or 1, {H}, {T} or 1, {window + 1})")
    if rotary is not None and rotary.shape != (K // 2,):
        raise ValueError(f"rotary has shape {tuple(rotary.shape)}; q {tuple(q.shape)} needs ({K // 2},)")
