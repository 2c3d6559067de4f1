"""What gradient a whole quantizer must hand to its keys, in fp64 and one key at a time.

vq, simvq       Gᵀg of the estimator                                                         (oracle.py)
fsq, ifsq       through projection, bound and expansion, with rounding taken as the identity
lfq, bsq        the same with Gᵀg of the estimator in place of the rounding
Where an estimator draws at random its matrix is not known beforehand, but its shape is: see `shape_error`.

Axes:  H heads  N keys  K key width  S codes  d rounded dimensions
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from transformer_vq.bench import oracle
from transformer_vq.ops import fsq
from transformer_vq.quantizers import Quantized, Quantizer
from transformer_vq.quantizers.fsq import FiniteScalarQuantizer
from transformer_vq.quantizers.nearest import NearestQuantizer
from transformer_vq.quantizers.signs import SignQuantizer

RANDOM = ("random_rotation", "gumbel")


def key_gradient(quantizer: Quantizer, k: Tensor, result: Quantized, g: Tensor) -> Tensor | None:
    """k, g (1, H, N, K), `result` of quantizing k -> the keys' gradient for ∂/∂k̂ = g; None where none is known."""
    k, g = k.detach().double(), g.double()
    if isinstance(quantizer, NearestQuantizer):
        codebook = quantizer.codebook.detach().double()
        return estimated(quantizer, k, result.quantized.detach().double(), g, codebook)
    if not isinstance(quantizer, FiniteScalarQuantizer | SignQuantizer):
        return None
    wide = copy.deepcopy(quantizer).double()
    leaf = k.requires_grad_()
    z = wide.project(leaf)
    if isinstance(wide, FiniteScalarQuantizer):
        levels = wide.config.levels
        values = fsq.digits_to_values(fsq.codes_to_digits(result.codes, levels), levels, torch.float64)
        z = fsq.bound(z, levels, wide.squash) / fsq.half_widths(z, levels)
    else:
        if wide.spherical:
            z = F.normalize(z, dim=-1)
        values = torch.stack([rows[c] for rows, c in zip(wide.implied, result.codes[0], strict=True)])[None]
    values = values.detach().requires_grad_()
    (to_values,) = torch.autograd.grad(wide.expand(values), values, g)
    if isinstance(wide, SignQuantizer):
        passed = estimated(wide, z.detach(), values.detach(), to_values, wide.implied.detach())
        if passed is None:
            return None
        to_values = passed
    (gradient,) = torch.autograd.grad(z, leaf, to_values)
    return gradient


def estimated(
    quantizer: NearestQuantizer | SignQuantizer, k: Tensor, q: Tensor, g: Tensor, codebook: Tensor
) -> Tensor | None:
    """Gᵀg of the quantizer's estimator: k, q, g (1, H, N, K), codebook (H, S, K); None where none is known."""
    config = quantizer.config
    if config.estimator not in (*oracle.MATRICES, *oracle.SOFT):
        return None
    rows = zip(k[0], q[0], g[0], codebook, strict=True)
    return torch.stack([oracle.key_gradient(config.estimator, *row, config.temperature, config.alpha) for row in rows])[
        None
    ]


def shape_error(estimator: str, k: Tensor, quantized: Tensor) -> float:
    """How far the matrices of an estimator that draws at random are from their shape, relative to the largest.

    k, quantized (1, H, N, K), with the graph between them; K backward passes.
    random_rotation   GᵀG = ρ² I and k̄ᵀ G k̄ = ρ cos(k, q), ρ = ‖q‖/‖k‖
    gumbel            G = (2/temperature) Σ_s π_s (c_s − c̄)(c_s − c̄)ᵀ for some π: symmetric, no negative eigenvalue
    """
    rows = [torch.autograd.grad(quantized[..., i].sum(), k, retain_graph=True)[0].double() for i in range(k.shape[-1])]
    G = torch.stack(rows, dim=-2)  # (1, H, N, K, K)
    size = G.flatten(-2).norm(dim=-1).clamp_min(1e-30)
    if estimator == "gumbel":
        lopsided = (G - G.mT).flatten(-2).norm(dim=-1)
        negative = torch.linalg.eigvalsh((G + G.mT) / 2).amin(-1).clamp_max(0).abs()
        share: float = ((lopsided + negative).max() / size.max()).item()
        return share
    q, k = quantized.detach().double(), k.detach().double()
    ratio = (q.norm(dim=-1) / k.norm(dim=-1))[..., None, None]
    turned = (G.mT @ G - ratio**2 * torch.eye(k.shape[-1], dtype=torch.float64)).flatten(-2).norm(
        dim=-1
    ) / size.max() ** 2
    along = torch.einsum("...i,...ij,...j->...", k, G, k) / k.square().sum(-1)
    angle = (along - ratio[..., 0, 0] * F.cosine_similarity(k, q, dim=-1)).abs() / size.max()
    return torch.maximum(turned, angle).max().item()
