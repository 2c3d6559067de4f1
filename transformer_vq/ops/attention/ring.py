"""One token after another on a GPU: a state as a ring that two kernels read and write in place.

A ring belongs to the loop that made it. Opening one copies, so that the state it goes on from never changes; a step
from a ring that has moved on since is refused. Imports triton.

Axes:  B batch  Hkv key heads  G queries a key head  K, V widths  S codes  M window        Oracle: recurrent.py
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from transformer_vq.ops.attention.arguments import check_state
from transformer_vq.ops.attention.kernels.decode import read_kernel, write_kernel
from transformer_vq.ops.attention.rotary import rotate
from transformer_vq.ops.attention.state import AttentionState
from transformer_vq.ops.kernels.device import launched, on_its_device

COLUMNS = 32
"""Codes or keys that a program reads at a time."""
PROGRAMS = 256
"""How many programs share the reading, about: a fixed number, so that sums are in the same order on every GPU."""


class Ring(NamedTuple):
    """A state, unrolled. Rows and key heads are one axis, B·Hkv."""

    codebook: Tensor
    """(Hkv, S, K), in the type of keys."""
    rotary: Tensor | None
    """(K/2,) radians per token."""
    far: Tensor | None
    """(2, K/2): cos and sin at distance M."""
    scale: float
    cache: bool
    codes: Tensor
    """(B·Hkv, M) int64."""
    raw: Tensor
    """(B·Hkv, M, K): keys as they came."""
    keys: Tensor
    """The same, turned by their places; without rotary positions the same tensor."""
    v: Tensor
    """(B·Hkv, M, V)."""
    alive: Tensor
    """(B, M) uint8."""
    count: Tensor  # type: ignore[assignment]
    """(B·Hkv, S) fp32 or wider."""
    mean: Tensor
    """(B·Hkv, S, V) fp32 or wider."""
    place: Tensor
    """(B·Hkv,) int64, where the next token goes; M at first. On the device: a captured step counts by itself."""
    start: AttentionState
    """The one that it was opened with."""
    taken: list[int]
    """One number, common to all rings with these tensors: the tokens that were written."""
    steps: int
    """The tokens that this one has seen."""


def open_ring(
    state: AttentionState, codebook: Tensor, *, rotary: Tensor | None = None, scale: float = 1.0, cache: bool = True
) -> Ring:
    """The ring that goes on from a state; codebook (Hkv, S, K), in the type of keys. Raises ValueError for a state made
    for other sizes.
    """
    B, Hkv, M = state.codes.shape
    S, K, V = codebook.shape[1], codebook.shape[2], state.v.shape[-1]
    check_state(state, (B, Hkv, K, V, S, M))
    dtype, wide = codebook.dtype, torch.promote_types(codebook.dtype, torch.float32)
    raw = state.k_hat.to(dtype).flatten(0, 1).clone(memory_format=torch.contiguous_format)
    keys, far = raw, None
    if rotary is not None:
        keys = rotate(raw.to(wide), torch.arange(M, device=raw.device), rotary).to(dtype)
        far = turn(torch.full((), M, device=raw.device), rotary, wide)
    return Ring(
        codebook=codebook.contiguous(),
        rotary=rotary,
        far=far,
        scale=scale,
        cache=cache,
        codes=state.codes.flatten(0, 1).clone(memory_format=torch.contiguous_format),
        raw=raw,
        keys=keys.contiguous(),
        v=state.v.to(dtype).flatten(0, 1).clone(memory_format=torch.contiguous_format),
        alive=state.alive.to(torch.uint8).clone(),
        count=state.count.flatten(0, 1).to(wide, copy=True),
        mean=state.mean.flatten(0, 1).to(wide, copy=True),
        place=torch.full((B * Hkv,), M, device=raw.device),
        start=state,
        taken=[0],
        steps=0,
    )


def turn(place: Tensor, rotary: Tensor, dtype: torch.dtype) -> Tensor:
    """(2, K/2): cos and sin of the angles at a place; angles are fp64."""
    angle = place.to(torch.float64) * rotary.to(torch.float64)
    return torch.stack([angle.cos(), angle.sin()]).to(dtype)


@on_its_device
def step(ring: Ring, q: Tensor, k_hat: Tensor, codes: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Ring]:
    """The next token of every row, real and of the document so far: o (B·Hkv, G, V), and the ring with the token.

    q (B·Hkv, G, K), k_hat (B·Hkv, K), v (B·Hkv, V) in the ring's type; codes (B·Hkv,) int64; bias (B or 1, Hkv, G,
    M+1), the farthest key first. No gradients.
    Raises ValueError for a ring that has moved on since: it is written in place.
    """
    check_ring(ring)
    rows, G, K = q.shape
    Hkv, S, _ = ring.codebook.shape
    M, V, wide = ring.raw.shape[1], v.shape[1], ring.mean.dtype
    tiles = (triton.cdiv(S, COLUMNS) if ring.cache else 0) + triton.cdiv(M, COLUMNS)
    parts = max(1, min(tiles, PROGRAMS // rows))
    top, norm = (torch.empty(rows, parts, G, dtype=wide, device=q.device) for _ in range(2))
    part = torch.empty(rows, parts, G, V, dtype=wide, device=q.device)
    o = torch.empty(rows, G, V, dtype=v.dtype, device=q.device)
    q, k_hat, v, codes = q.contiguous(), k_hat.contiguous(), v.contiguous(), codes.contiguous()
    angles = q if ring.rotary is None else turn(ring.place[:1], ring.rotary, wide)
    biased, bias_b = bias is not None, 0
    if bias is None:
        bias = q
    else:
        bias = bias.contiguous()
        bias_b = 0 if len(bias) == 1 else bias.stride(0)
    sizes = {"HK": Hkv, "G": G, "K": K, "VD": V, "BG": max(16, triton.next_power_of_2(G))}
    sizes |= {"BK": max(16, triton.next_power_of_2(K)), "BV": max(16, triton.next_power_of_2(V)), "PARTS": parts}
    sizes |= {"SCALE": ring.scale, "ROTARY": ring.rotary is not None, "BIASED": biased}
    sizes |= {"ACC": tl.float64 if wide == torch.float64 else tl.float32}
    sizes |= {"num_warps": 4 if max(K, V) <= 128 else 8}  # the tiles of 256 wide ones do not fit the registers of 4
    between = (angles, ring.place, top, norm, part)
    launched(read_kernel, (rows, parts))(
        q, ring.codebook, ring.count, ring.mean, ring.keys, ring.v, ring.alive, bias, bias_b,
        angles, angles if ring.far is None else ring.far, *between[1:], S, M,
        BN=COLUMNS, CACHE=ring.cache, PREC="ieee", **sizes,
    )  # fmt: skip
    launched(write_kernel, (rows,))(
        q, k_hat, v, codes, ring.count, ring.mean, ring.keys, ring.raw, ring.v, ring.codes, ring.alive, bias, bias_b,
        *between, o, S, M, **sizes,
    )  # fmt: skip
    if M:  # all key heads of a row have read it by now
        ring.alive.scatter_(1, ring.place.view(-1, Hkv)[:, :1].sub(1).remainder(M), 1)
    return o, moved_on(ring)


def check_ring(ring: Ring) -> None:
    """Raise ValueError for a ring that has moved on since."""
    if ring.taken[0] != ring.steps:
        raise ValueError(f"this ring has gone on by {ring.taken[0] - ring.steps} tokens; open another from a state")


def moved_on(ring: Ring) -> Ring:
    """The same after one more token, which its tensors hold or are about to; `ring` is refused from now on."""
    check_ring(ring)
    ring.taken[0] += 1
    return ring._replace(steps=ring.steps + 1)


def close_ring(ring: Ring) -> AttentionState:
    """The state that the ring stands for, in tensors of its own: what `vq_attention` returns after the same tokens."""
    check_ring(ring)
    old, M = ring.start, ring.raw.shape[1]
    B, Hkv = old.codes.shape[:2]
    order = (torch.arange(M, device=ring.codes.device) + ring.steps) % max(M, 1)
    alive = ring.alive.index_select(1, order).bool()

    def rolled(x: Tensor) -> Tensor:
        places: Tensor = x.index_select(1, order).unflatten(0, (B, Hkv))
        return places

    return AttentionState(
        codes=rolled(ring.codes),
        k_hat=rolled(ring.raw),
        v=rolled(ring.v),
        alive=alive,
        count=ring.count.clone().unflatten(0, (B, Hkv)),
        mean=ring.mean.clone().unflatten(0, (B, Hkv)),
        segment=old.segment,
        position=old.position + ring.steps,
    )
