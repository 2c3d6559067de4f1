"""What callers hand in beside tokens, under the names of Transformers and of those who pack documents; checked.

Axes:   B batch  T length
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from transformer_vq.models import ModelState
from transformer_vq.models.attention import VQAttention
from transformer_vq.models.language_model import Backbone
from transformer_vq.ops.attention import FullState


def real_tokens(attention_mask: Tensor | None, B: int, T: int, seen: int) -> Tensor | None:
    """The mask of the last T columns, (B, T) bool; None where nothing is known to be padding.

    Raises ValueError for a mask that is neither (B, T) nor (B, seen + T): the cache has then read another text.
    """
    if attention_mask is None:
        return None
    if attention_mask.shape not in {(B, T), (B, seen + T)}:
        after = f" or {(B, seen + T)}, for the cache has read {seen} columns," if seen else ""
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; {(B, T)}{after} is expected")
    mask = attention_mask[:, -T:].bool()
    return None if mask.device.type == "cpu" and bool(mask.all()) else mask


def documents(
    B: int,
    T: int,
    device: torch.device,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor | None:
    """(B, T) int64 number of each token's document, or None for one.  Raises ValueError where borders do not fit."""
    if cu_seqlens is not None:
        if B != 1:
            raise ValueError(f"cu_seqlens are of documents packed into one row; input has {B}")
        place = torch.arange(T, device=device)
        return torch.searchsorted(cu_seqlens.to(device).long(), place, right=True)[None]
    if seq_idx is not None:
        return seq_idx.long()
    if position_ids is None or T == 1:
        return None
    if position_ids.shape not in {(B, T), (1, T)}:
        raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}; {(B, T)} is expected")
    jumps = F.pad(position_ids.to(device).diff(dim=1) != 1, (1, 0))
    if device.type == "cpu" and not bool(jumps.any()):
        return None
    return jumps.cumsum(1).expand(B, T)


def check_state(state: ModelState, backbone: Backbone, B: int) -> None:
    """Raise ValueError where a cache belongs to another model or another batch."""
    layers, inputs, config = state.layers, state.inputs, backbone.config
    if len(layers) != len(backbone.layers):
        raise ValueError(f"cache is of a model with {len(layers)} layers; this one has {len(backbone.layers)}")
    rows = len(state.position)
    if rows != B:
        raise ValueError(f"cache has {rows} rows; the input has {B}")
    taps = inputs[0].shape[1] + 1 if inputs else 0
    if taps != config.conv:
        raise ValueError(f"cache is of a model with conv = {taps}; this one has {config.conv}")
    for i, (layer, kept) in enumerate(zip(backbone.layers, layers, strict=True)):
        full = isinstance(kept, FullState)
        if full != cast(VQAttention, layer).keeps_every_key:
            kinds = ("codes", "every key") if full else ("every key", "codes")
            raise ValueError(f"cache is of another model: its layer {i} keeps {kinds[1]}, this one's {kinds[0]}")
        keys = kept.k if isinstance(kept, FullState) else kept.k_hat
        theirs = (keys.shape[1], keys.shape[3], kept.v.shape[3], *(() if full else (keys.shape[2],)))
        ours = (config.key_value_heads, config.key_dim, config.value_dim, *(() if full else (config.window,)))
        if theirs != ours:
            what = "key heads, key width, value width" + ("" if full else ", window")
            raise ValueError(f"cache is of another model: its layer {i} has {theirs} ({what}), this one's {ours}")
