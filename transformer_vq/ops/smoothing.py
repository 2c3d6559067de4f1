"""The gradient of a loss that is smoothed by noise on a key, where the loss itself is a staircase.

Rounding makes the loss F(k) = L(q(k)) piecewise constant: its gradient is zero almost everywhere. Smoothed, it has one:

    F_σ(k) = E F(k + σε),  ε ~ N(0, I)            ∇F_σ(k) = E [F(k + σε) ε] / σ           (Stein, the score function)
                                                          = E [(F(k + σε) − F(k − σε)) ε] / 2σ       (ε and −ε alike)

As a function of one key, all others fixed, F takes a value F_s for each code s, so that

    F_σ(k) = Σ_s F_s P_s(k),   ∇F_σ(k) = Σ_s F_s ∇P_s(k),   P_s(k) = P(k + σε has code s)

Each ∇P_s is a score function again, of what is 1 where the code is s and 0 elsewhere. No more losses are needed than
there are codes, and a draw costs a lookup: thousands are cheap. The sum is, number for number, the score function of
F with these draws; nothing is approximated by the detour.

The mean over N draws is unbiased whatever F is, but its squared length is too large by the noise of the draws. So there
are two halves of the draws, whose means h₁ and h₂ are independent: E⟨h₁, h₂⟩ = ‖∇F_σ‖².

Axes:  … any leading axes  N draws  K key width  S codes
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from transformer_vq.ops.nearest import nearest_code


def score_gradient(change: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Mean of change_n ε_n / 2σ.  change (..., N): F(k + σε) − F(k − σε); noise (N, K): ε -> (..., K)."""
    return change @ noise / (2 * sigma * len(noise))


class CodeGradients(NamedTuple):
    """How the probabilities of a key's codes move with the key."""

    first: Tensor
    """(S, K): the ∇P_s of the first half of the draws, unbiased."""
    second: Tensor
    """(S, K): of the second half."""
    share: Tensor
    """(S): of the draws that have each code; codes at 0 have no gradient here."""


def code_gradients(
    k: Tensor, codebook: Tensor, noise: Tensor, sigma: float, metric: str = "euclidean"
) -> CodeGradients:
    """∇P_s(k) of every code of one key.  k (K), codebook (S, K), noise (N, K); each ε is used with both signs.

    Raises ValueError for an odd N, which has no halves.
    """
    N, S = len(noise), len(codebook)
    if N % 2 or not N:
        raise ValueError(f"{N} draws: must be an even number, for two halves")
    moved = torch.stack([k + sigma * noise, k - sigma * noise])[:, None]
    plus, minus = nearest_code(moved, codebook[None], metric)[:, 0]
    codes = torch.arange(S, device=k.device)[:, None]
    change = (codes == plus).to(noise.dtype) - (codes == minus).to(noise.dtype)
    half = N // 2
    first, second = (score_gradient(change[:, part], noise[part], sigma) for part in (slice(half), slice(half, N)))
    counts = torch.bincount(plus, minlength=S) + torch.bincount(minus, minlength=S)
    return CodeGradients(first, second, counts / (2 * N))
