"""What each estimator's gradient must be, written a second time: explicit K×K matrices in fp64, one per key.

Slow and plain on purpose, and independent of `ops/estimators`: the doctor and the tests hold the fast forms against it.
Every function gives G with ∂k̂/∂k = G, so that the keys' gradient is Gᵀg.

Axes:  N keys  K key width  S codes.   k̄, q̄ unit vectors of k, q
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Matrix = Callable[..., Tensor]
"""k (K,), q (K,), codebook (S, K), all fp64 -> G (K, K)."""


def identity(k: Tensor, q: Tensor, codebook: Tensor) -> Tensor:
    """G = I."""
    return torch.eye(k.numel(), dtype=k.dtype)


def _unit(x: Tensor) -> Tensor:
    x = x / x.abs().max()
    unit: Tensor = x / x.norm()
    return unit


def _degenerate(k: Tensor, q: Tensor) -> bool:
    """Zero or not finite: no direction, G = I."""
    return bool((k == 0).all() or (q == 0).all() or not torch.isfinite(torch.cat([k, q])).all())


def rotation_only(k: Tensor, q: Tensor, codebook: Tensor) -> Tensor:
    """R = I − 2 r rᵀ + 2 q̄ k̄ᵀ, r = (k̄+q̄)/‖k̄+q̄‖; I where k̄ = −q̄."""
    eye = identity(k, q, codebook)
    if _degenerate(k, q):
        return eye
    a, b = _unit(k), _unit(q)
    if (a + b).norm() < 1e-14:
        return eye
    r = (a + b) / (a + b).norm()
    return eye - 2 * torch.outer(r, r) + 2 * torch.outer(b, a)


def ratio(k: Tensor, q: Tensor) -> Tensor:
    """‖q‖/‖k‖; 1 where either has no direction."""
    if _degenerate(k, q):
        return torch.ones((), dtype=k.dtype)
    ratio: Tensor = (q / q.abs().max()).norm() / (k / k.abs().max()).norm() * (q.abs().max() / k.abs().max())
    return ratio


def _antipodal(k: Tensor, q: Tensor) -> bool:
    return not _degenerate(k, q) and bool((_unit(k) + _unit(q)).norm() < 1e-14)


def rotation(k: Tensor, q: Tensor, codebook: Tensor) -> Tensor:
    """(‖q‖/‖k‖) R."""
    if _antipodal(k, q):
        return identity(k, q, codebook)
    return ratio(k, q) * rotation_only(k, q, codebook)


def rotation_tangent(k: Tensor, q: Tensor, codebook: Tensor) -> Tensor:
    """(‖q‖/‖k‖) R (I − k̄ k̄ᵀ)."""
    if _degenerate(k, q) or _antipodal(k, q):
        return identity(k, q, codebook)
    a = _unit(k)
    return rotation(k, q, codebook) @ (identity(k, q, codebook) - torch.outer(a, a))


def rotation_centred(k: Tensor, q: Tensor, codebook: Tensor) -> Tensor:
    """`rotation` of k − μ and q − μ, μ the mean of the codebook's rows."""
    mean = codebook.mean(0)
    return rotation(k - mean, q - mean, codebook)


def scale(k: Tensor, q: Tensor, codebook: Tensor) -> Tensor:
    """(‖q‖/‖k‖) I."""
    return ratio(k, q) * identity(k, q, codebook)


def reflection(k: Tensor, q: Tensor, codebook: Tensor) -> Tensor:
    """The Householder reflection that takes k̄ to q̄, times ‖q‖/‖k‖; only the ratio where they are parallel."""
    eye = identity(k, q, codebook)
    if _degenerate(k, q):
        return eye
    a, b = _unit(k), _unit(q)
    if (a - b).norm() < 1e-14:
        return ratio(k, q) * eye
    n = (a - b) / (a - b).norm()
    return ratio(k, q) * (eye - 2 * torch.outer(n, n))


def diveq(k: Tensor, q: Tensor, codebook: Tensor, alpha: float = 1.0) -> Tensor:
    """I − α d̂ d̂ᵀ, d̂ = (q−k)/‖q−k‖; I where k = q."""
    eye = identity(k, q, codebook)
    if (k == q).all():
        return eye
    d = _unit(q - k)
    return eye - alpha * torch.outer(d, d)


MATRICES: dict[str, Matrix] = {
    "ste": identity,
    "rotation": rotation,
    "rotation_unscaled": rotation_only,
    "rotation_tangent": rotation_tangent,
    "rotation_centred": rotation_centred,
    "scale": scale,
    "reflection": reflection,
    "diveq": diveq,
}


SOFT = ("ibq", "reinmax")
"""Estimators whose gradient is that of a softmax over all codes, without noise."""


def key_gradient(
    name: str, k: Tensor, q: Tensor, g: Tensor, codebook: Tensor, temperature: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """Gᵀg of each row in fp64: k, q, g (N, K), codebook (S, K) -> (N, K).  KeyError where nothing is written down."""
    k, q, g, codebook = k.double(), q.double(), g.double(), codebook.double()
    if name in SOFT:
        return _soft_gradient(name, k, q, g, codebook, temperature)
    options = {"alpha": alpha} if name == "diveq" else {}
    rows = zip(k, q, g, strict=True)
    return torch.stack([MATRICES[name](ki, qi, codebook, **options).T @ gi for ki, qi, gi in rows])


def _soft_gradient(name: str, k: Tensor, q: Tensor, g: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """Gradient of (π C)·g, with the (N, S) matrix of probabilities that the fast form never makes.

    θ_s = −‖k − c_s‖²/temperature; ibq: π = softmax θ  [Shi 2412.02692]; reinmax, with D the one-hot of the code taken:
    π = 2 softmax(θ + sg(ln((D + softmax θ)/2) − θ)) − softmax(θ)/2  [Liu 2304.08612].
    """
    k = k.detach().requires_grad_()
    theta = -(k[:, None] - codebook).square().sum(-1) / temperature
    pi = theta.softmax(-1)
    if name == "reinmax":
        taken = nn.functional.one_hot((q[:, None] - codebook).square().sum(-1).argmin(-1), len(codebook))
        mean = ((taken + pi) / 2).log()
        pi = 2 * (theta + (mean - theta).detach()).softmax(-1) - pi / 2
    (gradient,) = torch.autograd.grad(((pi @ codebook) * g).sum(), k)
    return gradient
