"""What a backend receives: checked arguments in one layout, without padding and in one wide dtype.

A backend is a function `Call -> o`. Everything that all of them share happens once, here: shapes are checked, real
tokens move to the front, segment ids become run numbers, query heads are grouped under their key head.

Axes:  B batch  H query heads  Hkv key heads  G = H/Hkv  T length  K key width  V value width  S codes  M window
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transformer_vq.ops.attention.state import AttentionState, initial_state, pick
from transformer_vq.ops.nearest import lookup

GRADIENTS = ("window", "block")


@dataclass(frozen=True)
class Call:
    """One attention call. Floating tensors are fp32 or wider; padding, if any, is at the end of a row and all zero.

    Keys after the last real token are invisible to real queries by causality, so backends need no mask; what they
    return for padded queries is dropped, but must be finite.
    """

    q: Tensor
    """(B, Hkv, G, T, K), already multiplied by the scale."""
    k_hat: Tensor
    """(B, Hkv, T, K)."""
    v: Tensor
    """(B, Hkv, T, V)."""
    codes: Tensor
    """(B, Hkv, T) int64."""
    codebook: Tensor
    """(Hkv, S, K), detached."""
    bias: Tensor | None
    """(B or 1, Hkv, G, T or 1, M+1): added at distance 0 … M."""
    rotary: Tensor | None
    """(K/2,) radians per token."""
    state: AttentionState
    """Detached; the carried keys stand at positions −M … −1."""
    fresh: bool
    """No state came in: the one above is empty."""
    segment: Tensor | None
    """(B, T) ids, padding continuing the last one."""
    run: Tensor | None
    """(B, T) int64: number of the document in this call; the state's own document is 0. None: all 0."""
    length: Tensor
    """(B,) int64: real tokens of each row."""
    padded: bool
    """False: every row has T of them."""
    window: int
    block_len: int
    cache: bool
    gradients: str
    grad_through_cache: bool

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

        A codebook may have moved since the carried keys were made. Keys of this call are rows of it already, and the
        gradient rule `block` sends gradient to them here too.
        """
        return torch.cat([lookup(self.codebook, self.state.codes), self.k_hat], dim=2)


def prepare(
    q: Tensor,
    k_hat: Tensor,
    v: Tensor,
    codes: Tensor,
    codebook: Tensor,
    *,
    window: int,
    block_len: int,
    scale: float | None,
    bias: Tensor | None,
    rotary: Tensor | None,
    state: AttentionState | None,
    segments: Tensor | None,
    mask: Tensor | None,
    cache: bool,
    gradients: str,
    grad_through_cache: bool,
) -> Call:
    """The arguments of `vq_attention` as a `Call`. Raises ValueError with the shapes where they do not fit together."""
    check(q, k_hat, v, codes, codebook, window, block_len, bias, rotary, segments, mask, gradients)
    B, H, T, K = q.shape
    _, Hkv, _, V = v.shape
    S, G = codebook.shape[1], H // Hkv
    wide = torch.promote_types(torch.promote_types(q.dtype, v.dtype), torch.float32)  # fp64 stays: oracles keep digits

    fresh = state is None
    if state is None:
        state = initial_state(B, Hkv, K, V, S, window, dtype=wide, device=q.device)
    else:
        check_state(state, (B, Hkv, K, V, S, window))
        state = AttentionState(*(x.detach().to(wide) if x.is_floating_point() else x for x in state))

    key_dtype = k_hat.dtype
    q, k_hat, v = q.to(wide), k_hat.to(wide), v.to(wide)
    bias = None if bias is None else bias.to(wide)
    length = torch.full((B,), T, device=q.device)
    if mask is not None:
        length = mask.sum(1)
        order = real_first(mask)
        q, k_hat, v = (pick(x, order).masked_fill(~real(length, T)[:, None, :, None], 0) for x in (q, k_hat, v))
        codes = torch.take_along_dim(codes, order[:, None], dim=2)
        segments = None if segments is None else torch.take_along_dim(segments, order, dim=1)
        bias = bias if bias is None or bias.shape[2] == 1 else pick(bias, order)

    run = None
    if segments is not None:
        last = segments.gather(1, (length - 1).clamp_min(0)[:, None])
        segments = torch.where(real(length, T), segments, last)
        before = torch.where(state.position > 0, state.segment, segments[:, 0])
        run = (segments != torch.cat([before[:, None], segments[:, :-1]], dim=1)).long().cumsum(1)

    return Call(
        q=(q if scale is None else q * scale).unflatten(1, (Hkv, G)),
        k_hat=k_hat,
        v=v,
        codes=codes,
        codebook=codebook.detach().to(key_dtype).to(wide),  # the cache must see the rows that 16-bit keys are
        bias=None if bias is None else bias.unflatten(1, (Hkv, G)),
        rotary=rotary,
        state=state,
        fresh=fresh,
        segment=segments,
        run=run,
        length=length,
        padded=mask is not None,
        window=window,
        block_len=block_len,
        cache=cache,
        gradients=gradients,
        grad_through_cache=grad_through_cache,
    )


def real_first(mask: Tensor) -> Tensor:
    """(B, T) bool -> (B, T) int64: order that moves real tokens to the front and keeps them in order."""
    return torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)


def real(length: Tensor, T: int) -> Tensor:
    """(B,) -> (B, T) bool: the first `length` tokens."""
    return torch.arange(T, device=length.device) < length[:, None]


def check(
    q: Tensor,
    k_hat: Tensor,
    v: Tensor,
    codes: Tensor,
    codebook: Tensor,
    window: int,
    block_len: int,
    bias: Tensor | None,
    rotary: Tensor | None,
    segments: Tensor | None,
    mask: Tensor | None,
    gradients: str,
) -> None:
    """Raise ValueError, with the shapes, for arguments that do not belong together."""
    if window < 0 or block_len < 1:
        raise ValueError(f"window must be at least 0 and block_len at least 1, not {window} and {block_len}")
    if gradients not in GRADIENTS:
        raise ValueError(f"gradients must be one of {', '.join(GRADIENTS)}, not {gradients!r}")
    for name, x, axes in (("q", q, 4), ("v", v, 4), ("codebook", codebook, 3)):
        if x.dim() != axes:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it needs {axes} axes")
    B, H, T, K = q.shape
    Hkv, V = v.shape[1], v.shape[3]
    if Hkv == 0 or H % Hkv:
        raise ValueError(f"{H} query heads in q {tuple(q.shape)} do not divide among the {Hkv} of v {tuple(v.shape)}")
    wanted = [("k_hat", k_hat, (B, Hkv, T, K)), ("v", v, (B, Hkv, T, V)), ("codes", codes, (B, Hkv, T))]
    wanted += [(name, x, (B, T)) for name, x in (("segments", segments), ("mask", mask)) if x is not None]
    wanted += [("codebook", codebook, (Hkv, codebook.shape[1], K))]
    if rotary is not None:
        if K % 2:
            raise ValueError(f"rotary positions need an even key width; q {tuple(q.shape)} has {K}")
        wanted += [("rotary", rotary, (K // 2,))]
    for name, x, shape in wanted:
        if x.shape != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; q {tuple(q.shape)} and v need {shape}")
    if bias is not None and (
        bias.dim() != 4
        or bias.shape[0] not in (1, B)
        or bias.shape[1] != H
        or bias.shape[2] not in (1, T)
        or bias.shape[3] != window + 1
    ):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it needs ({B} or 1, {H}, {T} or 1, {window + 1})")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, True where a token is real, not {mask.dtype}")
    if codes.dtype != torch.int64:
        raise ValueError(f"codes must be int64, not {codes.dtype}")


def check_state(state: AttentionState, sizes: tuple[int, int, int, int, int, int]) -> None:
    """Raise ValueError where a state was made for other sizes (B, Hkv, K, V, S, M)."""
    for name, got, want in zip(
        AttentionState._fields, state, initial_state(*sizes, dtype=torch.float32, device="meta"), strict=True
    ):
        if got.shape != want.shape:
            raise ValueError(f"state.{name} has shape {tuple(got.shape)}; this call needs {tuple(want.shape)}")
