"""Distances between keys and codes as training losses.

Axes:  B batch  H heads  T length  K key width  S codes
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from transformer_vq.ops.numerics import full_precision, wide_dtype

ALIVE = 2**20  # probabilities of a head that exist at once, in a chunk of keys


class _SquaredDistance(torch.autograd.Function):
    """‖a − b‖² by rows. Saves its two arguments, which are alive anyway, and not their difference."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        difference = a.to(wide_dtype(a, b)) - b
        return torch.einsum("...k,...k->...", difference, difference)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        slope = (a.to(wide_dtype(a, b)) - b).mul_(2 * grads[0][..., None])
        to_a, to_b = ctx.needs_input_grad
        return slope.to(a.dtype) if to_a else None, slope.neg().to(b.dtype) if to_b else None


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """‖a_t − b_t‖², (..., K), (..., K) -> (...), fp32 or wider, also under autocast."""
    with torch.autocast(a.device.type, enabled=False):
        squared: Tensor = _SquaredDistance.apply(a, b)  # type: ignore[no-untyped-call]
        return squared


def mean_over_real(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of x (B, T) over real tokens; 0 when there is none."""
    if mask is None:
        return x.mean() if x.numel() else x.sum()
    return x.masked_fill(~mask, 0).sum() / mask.sum().clamp_min(1)  # a product would keep NaN at padding


def commitment(distance: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over batch and real time of the squared distance *summed* over heads and width  [Lingle 2309.16354].

    distance (B, H, T) of `squared_distance`.  Most VQ-VAE code, vector-quantize-pytorch too, averages over the width:
    a number smaller by a factor of K, for which their β of 0.25 to 1 is meant.
    """
    return mean_over_real(distance.sum(1), mask)


def orthogonality(codebook: Tensor) -> Tensor:
    """Mean squared cosine between two different codes of a head, (H, S, K) -> ()   [2112.00384, eq. 2].

    Σ_{i,j} cos²(c_i, c_j)/S² − 1/S: the sum over all pairs, less the S pairs of a code with itself.
    """
    S = codebook.shape[1]
    with full_precision(codebook.device):
        rows = F.normalize(codebook.to(wide_dtype(codebook)), dim=-1)
        return (rows @ rows.mT).square().sum((1, 2)).mean() / S**2 - 1 / S


def diversity(k: Tensor, codebook: Tensor, mask: Tensor | None, temperature: float) -> Tensor:
    """−H(p), p the mean over real keys of softmax_s(−‖k − c_s‖²/temperature); mean over heads, in nats.

    k (B, H, T, K), codebook (H, S, K) -> (). Least, −ln S, when codes are used evenly. Chunks of probabilities are
    recomputed in the backward pass.
    """
    wide = wide_dtype(k, codebook)
    keys = k.transpose(0, 1).flatten(1, 2)
    weight = keys.new_ones(keys.shape[1], dtype=wide) if mask is None else mask.flatten().to(wide)
    step = max(1, ALIVE // codebook.shape[1])
    total = torch.zeros(codebook.shape[:2], dtype=wide, device=k.device)
    for chunk, part in zip(keys.split(step, 1), weight.split(step), strict=True):
        inputs = (chunk, codebook, part, temperature)  # nothing is drawn: no generator's state is kept
        total = total + checkpoint(_soft_counts, *inputs, use_reentrant=False, preserve_rng_state=False)
    entropy: Tensor = -torch.special.entr(total / weight.sum().clamp_min(1)).sum(-1).mean()
    return entropy


def _soft_counts(keys: Tensor, codebook: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Σ over keys (H, N, K) of weight (N) times their soft assignment, (H, S) in the type of the weights."""
    with full_precision(keys.device):
        keys, codebook = keys.to(weight.dtype), codebook.to(weight.dtype)
        nearness = 2 * keys @ codebook.mT - codebook.square().sum(-1)[:, None]  # ‖k‖² is common to all codes
        return torch.einsum("n,hns->hs", weight, (nearness / temperature).softmax(-1))


def wasserstein(k: Tensor, codebook: Tensor, mask: Tensor | None) -> Tensor:
    """Wasserstein-2 distance of two normal distributions, with the moments of real keys and of codes  [2506.15078].

    √(‖μ_k − μ_c‖² + tr Σ_k + tr Σ_c − 2 tr (Σ_k^½ Σ_c Σ_k^½)^½), mean over heads; keys k (B, H, T, K) are constants,
    the codebook (H, S, K) moves. 0 without a real key. The last trace is the sum of singular values of Σ_k^½ times the
    centred codes: unlike a matrix root, its gradient exists for codes that span less than the space. On a GPU the host
    waits for PyTorch's eigenvalues.
    """
    wide = wide_dtype(k, codebook)
    keys, codes = k.detach().transpose(0, 1).flatten(1, 2).to(wide), codebook.to(wide)  # (H, N, K)
    if mask is None:
        mask = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool)
    else:
        keys = keys.masked_fill(~mask.reshape(-1, 1), 0)
    count = mask.sum().clamp_min(1)
    with full_precision(codes.device):
        key_mean = keys.sum(1, keepdim=True) / count
        code_mean = codes.mean(1, keepdim=True)
        centred_keys = (keys - key_mean).masked_fill_(~mask.reshape(-1, 1), 0)
        centred_codes = (codes - code_mean) / codes.shape[1] ** 0.5
        values, vectors = torch.linalg.eigh(centred_keys.mT @ centred_keys / count)
        root = vectors * values.clamp_min(0).sqrt()[:, None] @ vectors.mT
        overlap = torch.linalg.svdvals(centred_codes @ root).sum(-1)
        spread = values.clamp_min(0).sum(-1) + centred_codes.square().sum((1, 2))
        squared = (key_mean - code_mean).square().sum((1, 2)) + spread - 2 * overlap
        distance: Tensor = (squared.clamp_min(0) + 1e-8).sqrt().mean()  # the root has no slope at zero
        return torch.where(mask.any(), distance, 0)
