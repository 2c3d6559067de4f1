"""What a backend receives: checked arguments in one layout and without padding.

A backend is a function `Call -> o`. Everything that all of them share happens once, here: shapes are checked, real
tokens move to the front, segment ids become run numbers, query heads are grouped under their key head.

Axes:  B batch  H query heads  Hkv key heads  G = H/Hkv  T length  K key width  V value width  S codes  M window
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from transformer_vq.ops.attention.arguments import Arguments, check
from transformer_vq.ops.attention.block_length import chosen
from transformer_vq.ops.attention.padding import pick, real, real_first
from transformer_vq.ops.attention.state import AttentionState, initial_state
from transformer_vq.ops.nearest import lookup


@dataclass(frozen=True, kw_only=True)
class Call(Arguments):
    """The arguments of one attention call, made ready. Padding, if any, is at the end of a row and all zero.

    q is (B, Hkv, G, T, K), bias (B or 1, Hkv, G, T or 1, M+1); `scale` is not in q. Tensors are of the caller's types:
    logits, softmax, counts and means must be fp32 or wider all the same. The codebook is detached, in k_hat's type:
    the cache must see the rows that 16-bit keys are. Padding continues the last of `segments`; `mask` is None.

    Keys after the last real token are invisible to real queries by causality, so backends need no mask; what they
    return for padded queries is dropped, but must be finite.
    """

    block_len: int
    state: AttentionState
    """The carried keys stand at positions −M … −1. Keys and values of this call's types; detached unless `linked`."""
    fresh: bool
    """No state came in: the one above is empty."""
    run: Tensor | None
    """(B, T) int64: number of the document in this call; the state's own document is 0. None: all 0."""
    length: Tensor
    """(B,) int64: real tokens of each row."""
    padded: bool
    """False: every row has T of them."""

    @property
    def wide_dtype(self) -> torch.dtype:
        """fp32, or fp64 if queries or values are: oracles keep their digits."""
        return torch.promote_types(torch.promote_types(self.q.dtype, self.v.dtype), torch.float32)

    @property
    def common_dtype(self) -> torch.dtype:
        """The narrowest type that loses nothing of queries, keys and values: what enters products."""
        return torch.promote_types(torch.promote_types(self.q.dtype, self.k_hat.dtype), self.v.dtype)

    def wide(self) -> Call:
        """The same call with all floating tensors in `wide_dtype` and the scale inside q."""
        call, wide = self.of_type(self.wide_dtype), self.wide_dtype
        q = call.q if self.scale is None else call.q * self.scale
        return replace(call, q=q, scale=None, bias=None if self.bias is None else self.bias.to(wide))

    def of_type(self, dtype: torch.dtype) -> Call:
        """The same call with queries, keys, values and codebook of this type; bias, counts and means stay."""
        return replace(
            self,
            q=self.q.to(dtype),
            k_hat=self.k_hat.to(dtype),
            v=self.v.to(dtype),
            codebook=self.codebook.to(dtype),
            state=self.state.of_type(dtype, dtype, self.wide_dtype),
        )

    def learned(self) -> list[Tensor]:
        """What gets gradient: q, k_hat, v, the bias if there is one, and what is learned of a linked state."""
        own = [self.q, self.k_hat, self.v] if self.bias is None else [self.q, self.k_hat, self.v, self.bias]
        return [*own, *self.state.learned()] if self.linked else own

    def with_leaves(self) -> Call:
        """The same call on detached tensors, of which the learned ones require gradients."""
        q, k_hat, v, *rest = (x.detach().requires_grad_() for x in self.learned())
        bias = None if self.bias is None else rest.pop(0)
        state = self.state.with_learned(rest) if self.linked else self.state
        return replace(self, q=q, k_hat=k_hat, v=v, bias=bias, state=state)

    @property
    def query_run(self) -> Tensor:
        """(B, T): the document of each query."""
        return torch.zeros_like(self.codes[:, 0]) if self.run is None else self.run

    @property
    def key_run(self) -> Tensor:
        """(B, M+T): the document of each key, carried ones first; −1 where a carried slot is empty."""
        return torch.cat([self.state.alive.long() - 1, self.query_run], dim=1)

    @property
    def codes_with_carried(self) -> Tensor:
        """(B, Hkv, M+T)."""
        return torch.cat([self.state.codes, self.codes], dim=2)

    @property
    def v_with_carried(self) -> Tensor:
        """(B, Hkv, M+T, V)."""
        return torch.cat([self.state.v, self.v], dim=2)

    @property
    def k_with_carried(self) -> Tensor:
        """(B, Hkv, M+T, K): keys as they were made, for distances up to M."""
        return torch.cat([self.state.k_hat, self.k_hat], dim=2)

    @property
    def k_beyond_window(self) -> Tensor:
        """(B, Hkv, M+T, K): the same keys as the cache sees them, rows of the *current* codebook.

        A codebook may have moved since the carried keys were made, unless they are linked. Keys of this call are rows
        of it already, and the gradient rule `block` sends gradient to them here too; with `exact_window` they are not,
        and get none.
        """
        own = lookup(self.codebook, self.codes) if self.exact_window else self.k_hat
        of_today = self.linked and not self.exact_window
        return torch.cat([self.state.k_hat if of_today else lookup(self.codebook, self.state.codes), own], dim=2)


def prepare(x: Arguments) -> Call:
    """The arguments as backends want them. Raises ValueError with the shapes where they do not fit together."""
    check(x)
    q, k_hat, v, codes, bias, segments, mask = x.q, x.k_hat, x.v, x.codes, x.bias, x.segments, x.mask
    B, _, T, K = q.shape
    _, Hkv, _, V = v.shape
    wide = torch.promote_types(torch.promote_types(q.dtype, v.dtype), torch.float32)
    state = x.state
    if state is None:
        state = initial_state(B, Hkv, K, V, x.codebook.shape[1], x.window, dtype=wide, device=q.device)
    state = (state if x.linked else state.detach()).of_type(k_hat.dtype, v.dtype, wide)

    length = torch.full((B,), T, device=q.device)
    if mask is not None:
        length = mask.sum(1)
        order = real_first(mask)
        q, k_hat, v = (pick(y, order).masked_fill(~real(length, T)[:, None, :, None], 0) for y in (q, k_hat, v))
        codes = torch.take_along_dim(codes, order[:, None], dim=2)
        segments = None if segments is None else torch.take_along_dim(segments, order, dim=1)
        bias = bias if bias is None or bias.shape[2] == 1 else pick(bias, order)

    run = None
    if segments is not None:
        last = segments.gather(1, (length - 1).clamp_min(0)[:, None])
        segments = torch.where(real(length, T), segments, last)
        before = torch.where(state.position > 0, state.segment, segments[:, 0])
        run = (segments != torch.cat([before[:, None], segments[:, :-1]], dim=1)).long().cumsum(1)

    ready: dict[str, Any] = {
        "q": rearrange(q, "b (h g) t k -> b h g t k", h=Hkv),
        "k_hat": k_hat,
        "v": v,
        "codes": codes,
        "codebook": x.codebook.detach().to(k_hat.dtype),
        "bias": None if bias is None else rearrange(bias, "b (h g) t m -> b h g t m", h=Hkv),
        "state": state,
        "segments": segments,
        "mask": None,
    }
    block_len = x.block_len
    if block_len is None:
        S = x.codebook.shape[1] if x.cache else 0
        two_sided = x.rotary is not None or x.exact_window
        alone = T if x.state is None and not x.linked else None
        block_len, _ = chosen(q.device.type, S, x.window, q.shape[1] // Hkv, K, V, two_sided, alone)
    ready["block_len"] = block_len
    given = {field.name: getattr(x, field.name) for field in fields(x)} | ready
    return Call(**given, fresh=x.state is None, run=run, length=length, padded=mask is not None)
