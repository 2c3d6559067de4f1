"""How far one set of predictions is from another: KL(p ‖ q) of two softmaxes, in nats, piece by piece.

    KL = Σ_v p_v (log p_v − log q_v),   p = softmax(wanted), q = softmax(logits)        [Hinton 1503.02531, T = 1]

Axes:   N predictions  V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from transformer_vq.ops.cross_entropy import HELD


def summed_divergence(logits: Tensor, wanted: Tensor, counted: Tensor) -> Tensor:
    """Σ over counted rows of KL(softmax(wanted) ‖ softmax(logits)): (N, V), (N, V), (N,) bool -> (), fp32 or wider.

    Gradient to `logits` alone. Log-probabilities of many rows are computed piece by piece, and again in the backward
    pass. Raises ValueError where shapes differ.
    """
    if logits.shape != wanted.shape or counted.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)}, wanted {tuple(wanted.shape)}, counted {tuple(counted.shape)}")
    wanted = wanted.detach()
    if logits.numel() <= HELD:
        return _nats(logits, wanted, counted)
    rows = max(1, HELD // logits.shape[1])
    pieces = [
        checkpoint(_nats, *part, use_reentrant=False)
        for part in zip(logits.split(rows), wanted.split(rows), counted.split(rows), strict=True)
    ]
    return torch.stack(pieces).sum()


def _nats(logits: Tensor, wanted: Tensor, counted: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(logits.dtype, wanted.dtype), torch.float32)
    q, p = F.log_softmax(logits.to(wide), -1), F.log_softmax(wanted.to(wide), -1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1).masked_fill(~counted, 0).sum()
