"""Codebook health of one batch: detached scalars that cost next to nothing.

    usage              share of the codes that some key of the batch took, mean over heads
    perplexity         exp(entropy) of the batch's codes, mean over heads; grows with the batch
    norm_ratio         mean of ‖q‖/‖k‖ over keys; well below 1 is where `rotation` starves the task gradient
    cosine             mean of cos(k, q)
    relative_error     mean of ‖k − q‖/‖k‖, each capped at 10  [as in the reference]
    running_perplexity, dead_codes    of the running counts, where a kind has them; those begin equal, so that the first
                       tells about the keys only after a run of 1/(1−γ) steps

Axes:  B batch  H heads  T length  K key width  S codes
"""

from __future__ import annotations

import torch
from torch import Tensor

from transformer_vq.ops.numerics import wide_dtype

ROUNDING = 1e-5  # of a running count that stands at its threshold: nobody dies of the last digits


def code_counts(codes: Tensor, size: int, mask: Tensor | None) -> Tensor:
    """How often each code occurs at real tokens: codes (B, H, T) -> (H, S) fp32 (exact up to 2^24)."""
    H = codes.shape[1]
    flat = codes + torch.arange(H, device=codes.device)[:, None] * size
    weight = None if mask is None else mask[:, None].expand_as(codes).reshape(-1).float()
    counts = torch.zeros(H * size, device=codes.device)
    ones = torch.ones(codes.numel(), device=codes.device) if weight is None else weight
    return counts.index_add_(0, flat.reshape(-1), ones).view(H, size)


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy) of counts (H, S), mean over heads; 0 where nothing was counted."""
    share = counts / counts.sum(-1, keepdim=True).clamp_min(torch.finfo(counts.dtype).tiny)
    mean: Tensor = (torch.special.entr(share).sum(-1).exp() * (counts.sum(-1) > 0)).mean()
    return mean


def effective_rank(gram: Tensor) -> Tensor:
    """exp(entropy of the singular values) of vectors with Gram matrices Σ x xᵀ (H, K, K), mean over heads  [Roy 2007].

    K directions used alike have rank K, copies of one vector rank 1; 0 where there are no vectors.
    """
    sigma = torch.linalg.eigvalsh(gram.double()).clamp_min(0).sqrt()
    total = sigma.sum(-1, keepdim=True)
    share = sigma / total.clamp_min(torch.finfo(torch.float64).tiny)
    rank: Tensor = (torch.special.entr(share).sum(-1).exp() * (total[..., 0] > 0)).mean()
    return rank


@torch.no_grad()
def batch_health(k: Tensor, q: Tensor, distance: Tensor, counts: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Metrics of one batch. k, q (B, H, T, K); distance (B, H, T) = ‖k − q‖²; counts (H, S) of the batch."""
    wide = wide_dtype(k, q)
    floor = torch.finfo(wide).tiny
    k_norm, q_norm = (torch.linalg.vector_norm(x, dim=-1, dtype=wide).clamp_min(floor) for x in (k, q))
    inner = torch.einsum("bhtk,bhtk->bht", k.to(wide), q.to(wide))

    def mean(x: Tensor) -> Tensor:
        if mask is None:
            return x.mean()
        return x.masked_fill(~mask[:, None], 0).sum() / (mask.sum() * x.shape[1]).clamp_min(1)

    return {
        "usage": (counts > 0).float().mean(),
        "perplexity": perplexity(counts),
        "norm_ratio": mean(q_norm / k_norm),
        "cosine": mean(inner / k_norm / q_norm),
        "relative_error": mean((distance.sqrt() / k_norm).clamp(max=10)),
    }


@torch.no_grad()
def running_health(ema_count: Tensor, threshold: float) -> dict[str, Tensor]:
    """Metrics of the running counts (H, S): their perplexity, and the number of codes per head below `threshold`."""
    return {
        "running_perplexity": perplexity(ema_count),
        "dead_codes": (ema_count < threshold * (1 - ROUNDING)).sum(-1).to(ema_count.dtype).mean(),
    }
