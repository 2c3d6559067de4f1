"""Launches of the fused kernels: which runs when, over which grid, into which memory. Imports triton.

Letters and arguments: triton.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from transformer_vq.ops.attention.kernels.forward import forward_kernel
from transformer_vq.ops.attention.kernels.keys import OWN, STRIP, WINDOW, keys_kernel
from transformer_vq.ops.attention.kernels.plan import Plan
from transformer_vq.ops.attention.kernels.prefix import scan_kernel, sums_kernel
from transformer_vq.ops.attention.kernels.queries import queries_kernel
from transformer_vq.ops.attention.kernels.sweep import chain_kernel, sweep_kernel
from transformer_vq.ops.attention.kernels.tiles import Tile
from transformer_vq.ops.kernels.device import launched, on_its_device
from transformer_vq.ops.kernels.rows import Rows, rows

SCRATCH = 2**26
"""Entries of the gradient of a bias that exist at once, where they are added up over rows or time: 256 MB."""


class Caches(NamedTuple):
    """What the blocks see beyond their strips."""

    log_count: Tensor
    """(B, Hkv, N, S), base 2."""
    mean: Tensor
    """(B, Hkv, N, S, V)."""
    added: Tensor
    """(B, Hkv, N, S): keys that enter after block n."""
    filled: Tensor
    """(B, Hkv, N) int32: S, or 0 where a cache is empty."""


class Shape:
    """Sizes of a call, and the constants that its kernels share."""

    def __init__(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, two_sided: bool, bias: Tensor | None) -> None:
        (self.B, self.H, self.T, self.K), (self.Hkv, self.V) = q.shape, (v.shape[1], v.shape[3])
        self.S, self.N = plan.codebook.shape[1], triton.cdiv(self.T, plan.C)
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.acc = tl.float64 if self.wide == torch.float64 else tl.float32
        fast = q.device.type == "cuda" and max(self.K, self.V) <= 64
        self.products = {"PREC": "tf32x3" if q.dtype == torch.float32 and fast else "ieee", "ACC": self.acc}
        self.heads = {"H": self.H, "G": self.H // self.Hkv}
        self.key_width = {"K": self.K, "BK": max(16, triton.next_power_of_2(self.K))}
        self.value_width = {"VD": self.V, "BV": max(16, triton.next_power_of_2(self.V))}
        self.flags = {
            "ROTARY": two_sided,
            "BIASED": bias is not None,
            "RUNS": plan.run is not None,
            "CACHE": plan.cache,
            "SCALE": plan.scale,
        }
        self.pairs = {**self.heads, **self.key_width, **self.value_width, **self.flags, **self.products}


def options(tile: Tile) -> dict[str, int]:
    """How a kernel is compiled."""
    return {"num_warps": tile.warps, "num_stages": tile.stages}


def caches(plan: Plan, shape: Shape, v: Tensor) -> Caches:
    """Counts and means of every block."""
    B, Hkv, N, S, V, T = shape.B, shape.Hkv, shape.N, shape.S, shape.V, shape.T
    if not plan.cache:
        none = v.new_zeros(1)
        return Caches(none, none, none, none)
    tile, past, runs = plan.tiles.sums, plan.past, plan.run is not None
    added = torch.empty(B, Hkv, N, S, dtype=shape.wide, device=v.device)
    sums = torch.empty(B, Hkv, N, S, V, dtype=shape.wide, device=v.device)
    tiles_of_codes = triton.cdiv(S, tile.rows)
    run = plan.codes if plan.run is None else plan.run  # a pointer, if only one that is not followed
    shared = {"HK": Hkv, "C": plan.C, "BS": tile.rows, "RUNS": runs, **shape.value_width, **options(tile)}
    if N > 1:
        launched(sums_kernel, (N - 1, tiles_of_codes, B * Hkv))(
            rows(v), plan.codes, rows(v if past is None else past.v), plan.codes if past is None else past.codes,
            run if past is None else past.run, run, added, sums, T, plan.M, S, N,
            BJ=tile.columns, PAST=past is not None, **shared, **shape.products,
        )  # fmt: skip
    log_count = torch.empty(B, Hkv, N, S, dtype=shape.wide, device=v.device)
    mean = torch.empty(B, Hkv, N, S, V, dtype=v.dtype, device=v.device)
    launched(scan_kernel, (tiles_of_codes, B * Hkv))(
        added, sums, plan.count, plan.mean, run, log_count, mean, T, S, N, ACC=shape.acc, **shared
    )
    filled = (log_count.amax(-1) > float("-inf")).to(torch.int32) * S
    return Caches(log_count, mean, added, filled)


def common_arguments(
    plan: Plan,
    shape: Shape,
    cache: Caches,
    q: Tensor,
    q_far: Tensor | None,
    k: Tensor,
    k_far: Tensor | None,
    v: Tensor,
    bias: Tensor | None,
) -> tuple[Any, ...]:
    """What the walk over a strip reads, in the order of forward.py and queries.py."""
    past = plan.past
    run = plan.codes if plan.run is None else plan.run
    return (
        rows(q), rows(q if q_far is None else q_far), rows(k), rows(k if k_far is None else k_far), rows(v),
        rows(k if past is None else past.k), rows(k if past is None else past.k_far),
        rows(v if past is None else past.v), run if past is None else past.run, run,
        plan.codebook, cache.log_count, cache.mean, cache.filled, *bias_arguments(q, bias),
    )  # fmt: skip


def bias_arguments(q: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    """Where the bias starts, and its strides; 0 along an axis of one."""
    if bias is None:
        return q, 0, 0, 0
    bias = bias if bias.stride(-1) == 1 or bias.shape[-1] == 1 else bias.contiguous()
    return bias, *(0 if bias.shape[a] == 1 else bias.stride(a) for a in (0, 1, 2))


def tiles_of_queries(plan: Plan, T: int, rows_of_tile: int) -> int:
    """Tiles end with blocks."""
    whole, rest = divmod(T, plan.C)
    tiles: int = whole * triton.cdiv(plan.C, rows_of_tile) + triton.cdiv(rest, rows_of_tile)
    return tiles


@on_its_device
def attend(
    plan: Plan, q: Tensor, q_far: Tensor | None, k: Tensor, k_far: Tensor | None, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-> o (B, H, T, V), and logsumexp (B, H, T) in base 2."""
    shape, tile = Shape(plan, q, k, v, q_far is not None, bias), plan.tiles.forward
    B, H, T = shape.B, shape.H, shape.T
    cache = caches(plan, shape, v)
    o = torch.empty(B, H, T, shape.V, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=shape.wide, device=q.device)
    launched(forward_kernel, (tiles_of_queries(plan, T, tile.rows), H, B))(
        *common_arguments(plan, shape, cache, q, q_far, k, k_far, v, bias), rows(o), lse, T, plan.M, shape.S, shape.N,
        C=plan.C, BM=tile.rows, BN=tile.columns, PAST=plan.past is not None, SPLIT=tile.split, **shape.pairs,
        **options(tile),
    )  # fmt: skip
    return o, lse


@on_its_device
def gradients(
    plan: Plan,
    q: Tensor,
    q_far: Tensor | None,
    k: Tensor,
    k_far: Tensor | None,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    d_o: Tensor,
) -> tuple[Tensor | None, ...]:
    """Of q, q_far, k, k_far, v and bias, where they exist."""
    shape = Shape(plan, q, k, v, q_far is not None, bias)
    cache = caches(plan, shape, v)
    delta, dq = torch.empty_like(lse), torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dq_far = None if q_far is None else torch.empty_like(dq)
    shared = common_arguments(plan, shape, cache, q, q_far, k, k_far, v, bias)
    outputs = (rows(o), lse, rows(d_o), delta, rows(dq), rows(dq if dq_far is None else dq_far))
    d_bias = queries(plan, shape, shared, outputs, bias)

    tile, past_only = plan.tiles.keys, plan.gradients == "window"
    live = (WINDOW, STRIP if plan.through else WINDOW) if past_only else (STRIP,) * 2 if plan.through else (OWN,) * 2
    swept = plan.cache and plan.through and shape.N > 1
    R, carry, groups = sweep(plan, shape, cache, shared[1], lse, rows(d_o)) if swept else (lse, lse, 0)
    dk, dv = torch.empty(k.shape, dtype=k.dtype, device=k.device), torch.empty(v.shape, dtype=v.dtype, device=v.device)
    dk_far = None if k_far is None else torch.empty_like(dk)
    launched(keys_kernel, (triton.cdiv(shape.T, tile.rows), shape.Hkv, shape.B))(
        *shared[:5], plan.codes, shared[9], *shared[14:18], lse, rows(d_o), delta, R, carry,
        rows(dk), rows(dk if dk_far is None else dk_far), rows(dv), shape.T, plan.M, shape.S, shape.N, groups,
        C=plan.C, L=plan.L, U=plan.tiles.group, BM=tile.columns, BN=tile.rows, SWEPT=swept,
        KLIVE=live[0].value, VLIVE=live[1].value, SPLIT=tile.split, **shape.pairs, **options(tile),
    )  # fmt: skip
    return dq, dq_far, dk, dk_far, dv, d_bias


def queries(
    plan: Plan, shape: Shape, shared: tuple[Any, ...], outputs: tuple[Any, ...], bias: Tensor | None
) -> Tensor | None:
    """Write the gradients of queries and D; return that of the bias.

    Rows of the bias are written as they are where it has them all; else into scratch memory, a slice of time after the
    other, and added up in a fixed order.
    """
    tile, (B, H, T, M) = plan.tiles.queries, (shape.B, shape.H, shape.T, plan.M)
    count = tiles_of_queries(plan, T, tile.rows)
    constants = {"C": plan.C, "BM": tile.rows, "BN": tile.columns, "PAST": plan.past is not None, "SPLIT": tile.split}
    constants |= shape.pairs

    def launch(first: int, last: int, slice0: int, length: int, target: Tensor) -> None:
        launched(queries_kernel, (last - first, H, B))(
            *shared, *outputs, target, T, M, shape.S, shape.N, first, slice0, length, **constants, **options(tile)
        )

    if bias is None:
        launch(0, count, 0, T, outputs[1])
        return None
    if bias.shape == (B, H, T, M + 1):
        target = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
        target[:, :, :M] = 0  # there are fewer keys than distances
        launch(0, count, 0, T, target)
        return target
    d_bias = torch.zeros(bias.shape, dtype=shape.wide, device=bias.device)
    step = max(1, SCRATCH // (B * H * tile.rows * (M + 1)))
    for first in range(0, count, step):
        last = min(first + step, count)
        start, stop = (position(plan, t, tile.rows, T) for t in (first, last))
        scratch = torch.empty(B, H, stop - start, M + 1, dtype=shape.wide, device=bias.device)
        scratch[:, :, : max(0, M - start)] = 0
        launch(first, last, start, stop - start, scratch)
        place = d_bias if bias.shape[2] == 1 else d_bias[:, :, start:stop]
        place.add_(scratch.sum_to_size(place.shape))
    return d_bias.to(bias.dtype)


def position(plan: Plan, tile: int, rows_of_tile: int, T: int) -> int:
    """First query of a tile; T past the last."""
    block, inside = divmod(tile, triton.cdiv(plan.C, rows_of_tile))
    first: int = min(block * plan.C + inside * rows_of_tile, T)
    return first


def sweep(plan: Plan, shape: Shape, cache: Caches, q_far: Rows, lse: Tensor, d_o: Rows) -> tuple[Tensor, Tensor, int]:
    """-> R (B, Hkv, N, S, V) where a key enters, what flows into groups (B, Hkv, groups, S, V), their number."""
    B, Hkv, N, S, V = shape.B, shape.Hkv, shape.N, shape.S, shape.V
    tile, U = plan.tiles.sweep, plan.tiles.group
    groups = triton.cdiv(N, U)
    R = torch.empty(B, Hkv, N, S, V, dtype=shape.wide, device=lse.device)
    out = torch.empty(B, Hkv, groups, S, V, dtype=shape.wide, device=lse.device)
    carry = torch.empty_like(out)
    run = plan.codes if plan.run is None else plan.run
    shared = {"C": plan.C, "U": U, "BS": tile.rows, "RUNS": plan.run is not None, **shape.value_width}
    launched(sweep_kernel, (triton.cdiv(S, tile.rows), groups, B * Hkv))(
        q_far, plan.codebook, cache.log_count, cache.added, run, lse, d_o, R, out, shape.T, S, N,
        BM=tile.columns, SCALE=plan.scale, **shared, **shape.heads, **shape.key_width, **shape.products,
        **options(tile),
    )  # fmt: skip
    launched(chain_kernel, (triton.cdiv(S, tile.rows), B * Hkv))(
        out, carry, run, shape.T, S, N, groups, HK=Hkv, ACC=shape.acc, **shared, **options(tile)
    )
    return R, carry, groups
