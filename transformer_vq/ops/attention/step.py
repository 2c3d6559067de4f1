"""One token after another, without a copy: VQ attention on a memory that is appended to.

A `Memory` holds, in buffers with room for a few more tokens, what a state holds, ready to be multiplied:

    slots 0 … end−1 of the strip     older than the window | the window, M keys | free
    values   [m_s ; v_j]             addend   [log n_s ; 0, or −inf where a slot is dead]

A step reads all of it and writes slot `end`, which nobody who holds an older memory can see: no memory is ever changed.
Of two steps from one memory the second finds the slot taken, and copies. Keys that have left the window act through
their code, in the strip as in the means; when the room is used up they are folded into counts and means, and a new
strip begins. So a token costs O(S + M + ROOM), and a copy of the window once in ROOM tokens.

Axes:  B batch  Hkv key heads  G queries a key head  K, V widths  S codes  M window  C slots of the strip, M + ROOM
Oracle: recurrent.py, token by token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from transformer_vq.ops.attention.arguments import check_state
from transformer_vq.ops.attention.state import AttentionState, initial_state, sum_by_code

ROOM = 64
"""Tokens between two foldings: a folding costs as much as a few tokens, a full strip as half as many more keys."""


class Tables(NamedTuple):
    """What a layer's codebook and positions give once, for every token. See `tables`."""

    window: int
    cache: bool
    exact: bool
    """Keys in the window are seen as they are, not as their codes."""
    flat: Tensor
    """(Hkv·S, K), the codebook; with rotary positions complex, (Hkv·S, K/2)."""
    across: Tensor
    """(Hkv, K, S), the same transposed, in the order of numbers that queries are turned into."""
    turns: list[Tensor] | None
    """By place, rotary positions only, (2, 1, K/2) complex: what turns a query there against keys beyond the window,
    and everything there against keys in it."""


def tables(codebook: Tensor, window: int, cache: bool, rotary: Tensor | None, exact: bool = False) -> Tables:
    """codebook (Hkv, S, K), fp32 or fp64; rotary (K/2,) radians per token or None; the rest as in `vq_attention`."""
    Hkv, S, K = codebook.shape
    flat = codebook.reshape(Hkv * S, K)
    turns = None
    if rotary is not None:
        flat = as_complex(flat)
        places = torch.arange(window + ROOM, device=codebook.device)
        places = torch.stack([torch.full_like(places, window), places], dim=1)  # (C, 2)
        angle = places[..., None, None].to(torch.float64) * rotary.to(torch.float64)
        turns = list(torch.complex(angle.cos().to(codebook.dtype), angle.sin().to(codebook.dtype)))
    across = as_real(flat).view(Hkv, S, K).mT.contiguous()
    return Tables(window, cache, exact, flat, across, turns)


class Memory(NamedTuple):
    """A state in buffers. `end` is where the next token goes. Rows and key heads are one axis, B·Hkv."""

    tables: Tables
    state: AttentionState
    """The one that the strip began with."""
    first: Tensor | None
    """(B·Hkv, 1) int64: in `tables.flat`, the row of the first code of each head; None for one head."""
    codes: Tensor
    """(B·Hkv, G, C) int64, the same for all G."""
    keys: Tensor
    """(B·Hkv, C, K); with rotary positions turned by their place and complex, (B·Hkv, C, K/2)."""
    across: Tensor
    """(B·Hkv, K, C): a view of the keys."""
    made: Tensor | None
    """(B·Hkv, C, K): the keys as they were made, where codes do not tell them: `exact`."""
    values: Tensor
    """(B·Hkv, S+C, V): means, then the strip's."""
    addend: Tensor
    """(B·Hkv, 1, S+C)."""
    taken: list[int]
    """One number, common to all memories with these buffers: the slots that are written."""
    end: int


def open_memory(state: AttentionState, tables: Tables, groups: int, dtype: torch.dtype) -> Memory:
    """The memory that goes on from a state, for G = `groups`. Raises ValueError for a state made for other sizes."""
    Hkv, K, S = tables.across.shape
    M, V = tables.window, state.v.shape[-1]
    C = M + ROOM
    check_state(state, (state.codes.shape[0], Hkv, K, V, S, M))
    with torch.inference_mode(False), torch.no_grad():  # the buffers may be written to outside inference mode
        state = state.of_type(dtype, dtype, dtype)
        like, B = state.mean, state.codes.shape[0]
        first = torch.arange(0, Hkv * S, S, device=like.device).repeat(B)[:, None] if Hkv > 1 else None
        codes = state.codes.new_zeros(B * Hkv, groups, C)
        codes[:, :, :M] = state.codes.flatten(0, 1)[:, None]
        if tables.turns is None:
            keys = like.new_zeros(B * Hkv, C, K)
            keys[:, :M] = state.k_hat.flatten(0, 1)
        else:
            keys = torch.zeros(B * Hkv, C, K // 2, dtype=tables.flat.dtype, device=like.device)
            turns = torch.stack([turn[1, 0] for turn in tables.turns[:M]]) if M else keys[0, :0]
            keys[:, :M] = as_complex(state.k_hat).flatten(0, 1) * turns
        values = like.new_zeros(B * Hkv, S + C, V)
        values[:, :S], values[:, S : S + M] = state.mean.flatten(0, 1), state.v.flatten(0, 1)
        addend = like.new_zeros(B, Hkv, 1, S + C)
        addend[..., :S] = state.count.log()[:, :, None]
        addend[..., S : S + M].masked_fill_(~state.alive[:, None, None], float("-inf"))
        made = like.new_zeros(B * Hkv, C, K) if tables.exact else None
        addend = addend.flatten(0, 1)
        return Memory(tables, state, first, codes, keys, as_real(keys).mT, made, values, addend, [M], M)


def start_memory(B: int, V: int, tables: Tables, groups: int, dtype: torch.dtype) -> Memory:
    """The memory before the first token."""
    Hkv, K, S = tables.across.shape
    state = initial_state(B, Hkv, K, V, S, tables.window, dtype, tables.across.device)
    return open_memory(state, tables, groups, dtype)


def close_memory(memory: Memory) -> AttentionState:
    """The state that the memory stands for: what `vq_attention` returns after the same tokens."""
    old, M, S, end = memory.state, memory.tables.window, memory.tables.across.shape[2], memory.end
    if (steps := end - M) == 0:
        return old
    B, Hkv = old.codes.shape[:2]
    codes = memory.codes[:, 0].unflatten(0, (B, Hkv))
    values = memory.values.unflatten(0, (B, Hkv))
    if memory.made is not None:
        made = memory.made[:, M:end].unflatten(0, (B, Hkv))
    else:
        rows = memory.codes[:, 0, M:end]
        rows = rows if memory.first is None else rows + memory.first
        flat = as_real(memory.tables.flat, side_by_side=False)
        made = flat.index_select(0, rows.reshape(-1)).view(B, Hkv, steps, -1)  # bit for bit what a step was given
    alive = torch.cat([old.alive, old.alive.new_ones(B, steps)], dim=1)
    left = codes[:, :, :steps].masked_fill(~alive[:, None, :steps], S)
    count, total = sum_by_code(left, values[:, :, S : S + steps], S)
    after = (old.count + count).clamp_min(1)
    return AttentionState(
        codes=codes[:, :, steps:end].clone(),
        k_hat=torch.cat([old.k_hat, made], dim=2)[:, :, steps:],
        v=values[:, :, S + steps : S + end].clone(),
        alive=alive[:, steps:],
        count=old.count + count,
        mean=(old.count / after)[..., None] * old.mean + total / after[..., None],
        segment=old.segment,
        position=old.position + steps,
    )


def step(memory: Memory, q: Tensor, k: Tensor, codes: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Memory]:
    """The next token of every row, real and of the document so far: o (B·Hkv, G, V), and the memory with the token.

    q (B·Hkv, G, K), scaled; k (B·Hkv, K), read where `exact`; codes (B·Hkv, 1) int64, of the codebook in the tables;
    v (B·Hkv, V); bias (Hkv or B·Hkv, G, M+1), the farthest key first. All of one type, fp32 or fp64, on one device; no
    gradients.
    """
    given, _, first, all_codes, keys, across, made, values, addend, taken, end = memory
    M, S, slots = given.window, given.across.shape[2], all_codes.shape[2]
    if end == slots:
        G, dtype = all_codes.shape[1], values.dtype
        return step(open_memory(close_memory(memory), given, G, dtype), q, k, codes, v, bias)
    if taken[0] != end:
        return step(fork(memory), q, k, codes, v, bias)
    taken[0] = end + 1

    all_codes.select(2, end).copy_(codes)
    if made is None:
        k_hat = given.flat.index_select(0, (codes if first is None else codes + first).view(-1))
    else:
        made.select(1, end).copy_(k)
        k_hat = k if given.turns is None else as_complex(k)
    if given.turns is None:
        keys.select(1, end).copy_(k_hat)
        q_far = q
    else:
        turns = given.turns[end]
        keys.select(1, end).copy_(k_hat * turns[1])
        q_far, q = as_real(as_complex(q).unsqueeze(1) * turns).unbind(1)
    values.select(1, S + end).copy_(v)

    logits = torch.bmm(q, across.narrow(2, end - M, M + 1))
    if bias is not None:
        logits = (logits.unflatten(0, (-1, len(bias))) + bias).flatten(0, 1)
    if given.cache:
        far = per_head(q_far, given.across)
        parts = [far, far.gather(2, all_codes.narrow(2, 0, end - M)), logits] if end > M else [far, logits]
        logits, seen = torch.cat(parts, dim=2), (0, S + end + 1)
    else:
        seen = (S + end - M, M + 1)
    p = logits.add_(addend.narrow(2, *seen)).softmax(2)
    o = torch.bmm(p, values.narrow(1, *seen))
    return o, memory._replace(end=end + 1)


def per_head(q: Tensor, across: Tensor) -> Tensor:
    """q (B·Hkv, G, K), across (Hkv, K, S) -> (B·Hkv, G, S): one product a head, not one a head and row."""
    rows, G, K = q.shape
    Hkv = len(across)
    if rows == Hkv:
        return torch.bmm(q, across)
    if Hkv == 1:
        return torch.mm(q.reshape(-1, K), across[0]).view(rows, G, -1)
    together = q.view(-1, Hkv, G, K).transpose(0, 1).reshape(Hkv, -1, K)
    return torch.bmm(together, across).view(Hkv, -1, G, across.shape[2]).transpose(0, 1).flatten(0, 1)


def fork(memory: Memory) -> Memory:
    """The same memory in buffers of its own."""
    with torch.inference_mode(False), torch.no_grad():
        codes, keys, values, addend = (x.clone() for x in (memory.codes, memory.keys, memory.values, memory.addend))
        made = None if memory.made is None else memory.made.clone()
    return memory._replace(
        codes=codes, keys=keys, across=as_real(keys).mT, made=made, values=values, addend=addend, taken=[memory.end]
    )


def as_complex(x: Tensor) -> Tensor:
    """(..., K), pairs (x_c, x_{c+K/2}), -> (..., K/2) complex."""
    half = x.shape[-1] // 2
    return torch.complex(x[..., :half], x[..., half:])


def as_real(x: Tensor, side_by_side: bool = True) -> Tensor:
    """(..., K/2) complex -> (..., K), the two of a pair side by side, or as `as_complex` has them; a real x: itself."""
    if not x.is_complex():
        return x
    return torch.view_as_real(x).flatten(-2) if side_by_side else torch.cat([x.real, x.imag], dim=-1)
