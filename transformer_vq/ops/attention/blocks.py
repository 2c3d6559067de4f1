"""Pieces of block-wise attention: how a chunk of blocks is cut out of the sequence, masked, and put back.

A block of L queries starting at s sees a strip of M+L keys, at positions s−M … s+L−1. In row r and column c of the
strip the distance is M+r−c, so inside the strip there are three regions:

    c < r          beyond the window ("bubble": no position, only its code)
    r ≤ c ≤ r+M    the window, a band of M+1 columns, distance M at its left end and 0 at its right
    c > r+M        the future

Keys left of the strip act through the cache: count and mean value per code, one column for each of the S codes.

Axes:  b, h, n rows, key heads, blocks of a chunk  G queries a key head  T length  D width  S codes  M window  L block
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_vq.ops.numerics import full_precision
from transformer_vq.ops.sums import add_rows

ROWS = {"cpu": 4096}
"""Queries that are worked on together: enough to fill batched products, few enough to stay in the processor's cache."""
ROWS_ELSEWHERE = 65536


def rows_at_once(device: torch.device) -> int:
    """Queries of a chunk."""
    return ROWS.get(device.type, ROWS_ELSEWHERE)


def blocks_at_once(L: int, groups: int, rows: int) -> int:
    """How many blocks, of all rows and heads together, make a chunk of so many queries."""
    return max(1, rows // (L * groups))


def blocks_of_chunk(N: int, L: int, groups: int, rows: int) -> int:
    """How many of a row's N blocks are in one chunk."""
    return min(N, blocks_at_once(L, groups, rows))


class Chunk(NamedTuple):
    """What is worked on together: slices of batch rows, of key heads and of blocks."""

    b: slice
    h: slice
    n: slice


@dataclass(frozen=True)
class Plan:
    """Everything about a call that gets no gradient. Keys are laid out as M carried ones, then N·L of the call."""

    codes: Tensor
    """(B, Hkv, M+N·L) int64; S where there is no key."""
    codebook: Tensor
    """(Hkv, S, K), without rows where there is no cache, or nothing left of the strip that it could stand for."""
    count: Tensor
    """(B, Hkv, S): the cache that the first block sees."""
    total: Tensor
    """(B, Hkv, S, V): sums, not means; they never leave the call, and are fp32 or wider."""
    query_run: Tensor | None
    """(B, N·L) document of each query; None: one document."""
    key_run: Tensor
    """(B, M+N·L) document of each key; −1 where there is none."""
    M: int
    L: int
    N: int
    groups: int
    rows: int
    """Queries of a chunk."""
    beyond: bool
    """Whether a query sees keys of its strip beyond the window."""
    scale: float | None
    """Of content logits; None: it is in q already."""
    gradients: str
    through: bool
    """`grad_through_cache`."""

    @property
    def cached(self) -> int:
        """Columns of means in front of each strip: S, or 0."""
        return self.codebook.shape[1]

    def chunks(self, threads: int = 1) -> Iterator[list[Chunk]]:
        """For each group of batch rows and key heads: its chunks, in the order of time.

        As many rows and heads are in a group as fill a chunk, but few enough that each of `threads` has a group.
        """
        B, Hkv, _ = self.codes.shape
        blocks = blocks_at_once(self.L, self.groups, self.rows)
        n = blocks_of_chunk(self.N, self.L, self.groups, self.rows)
        together = max(1, min(blocks // n, B * Hkv // threads))
        h = min(Hkv, together)
        b = min(B, max(1, together // h))
        for i in range(0, B, b):
            for j in range(0, Hkv, h):
                rows, heads = slice(i, min(i + b, B)), slice(j, min(j + h, Hkv))
                yield [Chunk(rows, heads, slice(m, min(m + n, self.N))) for m in range(0, self.N, n)]

    def goes_on(self, at: Chunk) -> Tensor | None:
        """(b, n) bool: whether the block after each of the chunk starts in the same document; None: all do."""
        if self.query_run is None:
            return None
        starts = F.pad(self.query_run[at.b, :: self.L], (0, 1), value=-2)[:, at.n.start : at.n.stop + 1]
        return starts[:, 1:] == starts[:, :-1]

    def leaving(self, at: Chunk) -> Tensor:
        """(b, h, n, L) codes of the keys that pass from the strip to the cache after each block; S where none does."""
        first, last = at.n.start * self.L, at.n.stop * self.L
        codes: Tensor = self.codes[at.b, at.h, first:last].unflatten(2, (-1, self.L))
        if self.query_run is None:
            return codes
        following = F.pad(self.query_run[at.b, self.L :: self.L], (0, 1), value=-2)[:, at.n, None]
        stays = self.key_run[at.b, first:last].unflatten(1, (-1, self.L)) == following
        return codes.masked_fill(~stays[:, None], self.cached)


KEPT = 2**23
"""Numbers of the largest scratch tensor that a thread keeps, 32 MiB in fp32."""
_lasting = threading.local()


class Buffers:
    """Scratch memory, allocated once and used by every chunk: fresh pages cost more than the arithmetic on them.

    Tensors are uninitialised, contiguous and at offset 0. On a CPU a thread keeps those up to KEPT for its next calls.
    """

    def __init__(self, wide: Tensor, narrow: torch.dtype) -> None:
        self.wide, self.narrow_dtype = wide, narrow
        self.lasts = wide.device.type == "cpu" and type(wide) is Tensor
        self.made: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Wide, of this shape."""
        return self._make(name, self.wide.dtype, shape)

    def narrow(self, name: str, *shape: int) -> Tensor:
        """As it enters a product."""
        return self._make(name, self.narrow_dtype, shape)

    def narrowed(self, name: str, x: Tensor) -> Tensor:
        """x itself where all is wide, else a copy."""
        return x if x.dtype == self.narrow_dtype else self.narrow(name, *x.shape).copy_(x)

    def _make(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        size, key = torch.Size(shape).numel(), f"{name} {dtype}"
        made: dict[str, Tensor] = self.made if size > KEPT or not self.lasts else _lasting.__dict__
        if key not in made or made[key].numel() < size:
            with torch.inference_mode(False):  # so that any call may write there
                made[key] = torch.empty(size, dtype=dtype, device=self.wide.device)
        return made[key][:size].view(shape)


def query_rows(x: Tensor, at: Chunk, plan: Plan) -> Tensor:
    """x (B, Hkv, G, T, D) -> (b, h, n, G·L, D), zeros past the end; a view where the layout allows."""
    x = x[at.b, at.h, :, at.n.start * plan.L : at.n.stop * plan.L]
    missing = (at.n.stop - at.n.start) * plan.L - x.shape[3]
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    rows: Tensor = x.unflatten(3, (-1, plan.L)).transpose(2, 3).flatten(3, 4)
    return rows


def put_query_rows(target: Tensor, rows: Tensor, at: Chunk, plan: Plan) -> None:
    """The inverse: rows (b, h, n, G·L, D) into target (B, Hkv, G, T, D)."""
    place = target[at.b, at.h, :, at.n.start * plan.L : at.n.stop * plan.L]
    rows = rows.unflatten(3, (plan.groups, plan.L)).transpose(2, 3).flatten(3, 4)
    place.copy_(rows[:, :, :, : place.shape[3]])


def strips(x: Tensor, at: Chunk, plan: Plan) -> Tensor:
    """x (B, Hkv, M+N·L, D) -> (b, h, n, M+L, D), an overlapping view."""
    x = x[at.b, at.h, at.n.start * plan.L : plan.M + at.n.stop * plan.L]
    return x.unfold(2, plan.M + plan.L, plan.L).mT


def add_strips(target: Tensor, x: Tensor, at: Chunk, plan: Plan, skip: int = 0) -> None:
    """Add x (b, h, n, M+L−skip, D), the strips without their first `skip` keys, to target (B, Hkv, M+N·L, D).

    Strips overlap, so this goes by pieces of L columns, which do not.
    """
    n = at.n.stop - at.n.start
    for c in range(0, x.shape[3], plan.L):
        width = min(plan.L, x.shape[3] - c)
        first = at.n.start * plan.L + skip + c
        place = target[at.b, at.h, first : first + (n - 1) * plan.L + width].unfold(2, width, plan.L).mT
        place.add_(x[:, :, :, c : c + width])


def band(x: Tensor, plan: Plan) -> Tensor:
    """The window inside logits x (b, h, n, G·L, S+M+L), contiguous from offset 0: a view (b, h, n, G, L, M+1).

    Column m is distance M−m: rows shift by one column each, which is a stride of one row and one column.
    """
    b, h, n, rows, width = x.shape
    size = (b, h, n, plan.groups, plan.L, plan.M + 1)
    stride = (h * n * rows * width, n * rows * width, rows * width, plan.L * width, width + 1, 1)
    return x.as_strided(size, stride, x.storage_offset() + width - plan.M - plan.L)


def bias_rows(bias: Tensor, at: Chunk, plan: Plan) -> Tensor:
    """bias (B or 1, Hkv, G, T or 1, M+1) -> what `band` adds up with: (b or 1, h, n or 1, G, L or 1, M+1)."""
    bias = bias[at.b if bias.shape[0] > 1 else slice(None)]
    if bias.shape[3] == 1 < plan.N * plan.L:
        return bias[:, at.h].unsqueeze(3).transpose(2, 3).flip(-1)
    everything = Chunk(slice(None), at.h, at.n)
    rows: Tensor = query_rows(bias, everything, plan).unflatten(3, (plan.groups, plan.L)).flip(-1)
    return rows


def add_bias_grad(target: Tensor, d_band: Tensor, at: Chunk, plan: Plan) -> None:
    """Add d_band (b, h, n, G, L, M+1) to the gradient of a bias (B or 1, Hkv, G, T or 1, M+1)."""
    d = d_band.flip(-1).transpose(2, 3).flatten(3, 4)  # (b, h, G, n·L, M+1)
    place = target[at.b if target.shape[0] > 1 else slice(None), at.h]
    if target.shape[3] > 1:
        place = place[:, :, :, at.n.start * plan.L : at.n.stop * plan.L]
        d = d[:, :, :, : place.shape[3]]
    place.add_(d.sum_to_size(place.shape))


def hide(logits: Tensor, at: Chunk, plan: Plan) -> None:
    """Set to −inf what a query may not see: the future, other documents, empty slots, and without cache the bubble.

    logits (b, h, n, G, L, S+M+L), changed in place.
    """
    L, M, S = plan.L, plan.M, plan.cached
    never = logits.new_full((L, L), float("-inf"))
    logits[..., S + M :].add_(never.triu(1))
    if not plan.beyond:
        logits[..., : min(L, M + L)].add_(never.tril(-1))
    key_run = strips(plan.key_run[:, None, :, None], Chunk(at.b, slice(None), at.n), plan)[:, :, :, None, None, :, 0]
    if plan.query_run is not None:
        query_run = plan.query_run[at.b, at.n.start * L : at.n.stop * L].unflatten(1, (-1, L))  # (b, n, L)
        query = query_run[:, None, :, None, :, None]
        logits[..., S:].masked_fill_(query != key_run, float("-inf"))
        logits[..., :S].masked_fill_(query != query[..., :1, :], float("-inf"))
    elif at.n.start * L < M:
        empty = key_run[:, :, : -(-M // L) - at.n.start] < 0
        logits[:, :, : empty.shape[2], :, :, S:].masked_fill_(empty, float("-inf"))


def run_up(x: Tensor, goes_on: Tensor | None, backwards: bool = False) -> None:
    """Running sums over blocks, in place: x (b, h, n+1, ...), from the first to the last or from the last to the first.

    They start anew where `goes_on` (b, n) says that the next block is of another document.
    """
    n = x.shape[2] - 1
    if x.device.type != "cpu":
        links = x.new_ones(1, n + 1, n + 1).tril()
        if goes_on is not None:
            document = F.pad((~goes_on).cumsum(1), (1, 0))
            links = links * (document[:, :, None] == document[:, None])
        links = links.mT if backwards else links
        with full_precision(x.device):  # counts too are summed here
            x.copy_((links[:, None] @ x.flatten(3)).view(x.shape))  # one launch instead of n
        return
    blocks = list(x.unbind(2))
    same = None if goes_on is None else goes_on.to(x.dtype).view(-1, n, *[1] * (x.dim() - 2)).unbind(1)
    for i in range(n - 1, -1, -1) if backwards else range(n):
        source, target = (blocks[i + 1], blocks[i]) if backwards else (blocks[i], blocks[i + 1])
        if same is None:
            target.add_(source)
        else:
            target.addcmul_(source, same[i])


def entry_rows(at: Chunk, plan: Plan) -> Tensor:
    """For each key of a chunk, b·h·n·L of them, its place among b·h lists of n+1 blocks of S+1 codes.

    The block is the first that sees the key through the cache, or, with the row of code S, none.
    """
    codes = plan.leaving(at)
    b, h, n, _ = codes.shape
    block = torch.arange(b * h * (n + 1), device=codes.device).view(b, h, n + 1)[:, :, 1:, None]
    return (block * (plan.cached + 1) + codes).flatten()


def cache_prefix(
    count: Tensor, total: Tensor, v: Tensor, at: Chunk, plan: Plan, buffers: Buffers
) -> tuple[Tensor, Tensor]:
    """The cache of each block of a chunk and of the next chunk's first, given that of its own first.

    count (b, h, S), total (b, h, S, V), v (B, Hkv, M+N·L, V) -> counts (b, h, n+1, S), totals (b, h, n+1, S, V), in
    scratch memory; all wide but v, which may be narrower.
    """
    b, h, S, V = total.shape
    n, rows = at.n.stop - at.n.start, entry_rows(at, plan)
    counts, totals = buffers("counts", b, h, n + 1, S + 1), buffers("totals", b, h, n + 1, S + 1, V)
    values = v[at.b, at.h, at.n.start * plan.L : at.n.stop * plan.L].to(totals.dtype).flatten(0, 2)
    for sums, first, more in ((counts, count, rows.new_ones(()).to(counts.dtype)), (totals, total, values)):
        sums.zero_()
        sums[:, :, 0, :S] = first
        flat = sums.flatten(0, 3)
        add_rows(flat, rows, more.expand(len(rows), *flat.shape[1:]))
        run_up(sums, plan.goes_on(at))
    return counts[:, :, :, :S], totals[:, :, :, :S]


def cache_backward(
    d_v: Tensor, d_means: Tensor, counts: Tensor, running: Tensor, at: Chunk, plan: Plan, buffers: Buffers
) -> Tensor:
    """Hand the gradient of the means, d_means (b, h, n, S, V), to the values in them.

    A key that leaves the strip after block n is in the sums of all later blocks of its document: it gets, for its code,
    R_{n+1} = dm_{n+1}/n_{n+1} + R_{n+2}. `running` (b, h, S, V) is R of the next chunk; returns R of this one.
    """
    b, h, n, S, V = d_means.shape
    R = buffers("totals", b, h, n + 1, S + 1, V)
    torch.div(d_means, counts.clamp_min(1)[..., None], out=R[:, :, :n, :S])
    R[:, :, n, :S] = running
    R[:, :, :, S] = 0  # what keys that enter no sum get
    run_up(R, plan.goes_on(at), backwards=True)
    got = R.flatten(0, 3).index_select(0, entry_rows(at, plan)).view(b, h, n * plan.L, V)
    d_v[at.b, at.h, at.n.start * plan.L : at.n.stop * plan.L].add_(got)
    return R[:, :, 0, :S].clone()
