"""What each estimator's gradient must be, written a second time: explicit K×K matrices in fp64, one per key.

Slow and plain on purpose, and independent of `ops/estimators`: the doctor and the tests hold the fast forms against it.
Every function gives G with ∂k̂/∂k = G, so that the keys' gradient is Gᵀg.

Axes:  N keys  K key width  S codes.   k̄, q̄ unit vectors of k, q
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Matrix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""k (K,), q (K,), codebook (S, K), all fp64 -> G (K, K)."""


def identity(k: Tensor, q: Tensor, codebook: Tensor) -> Tensor:
    """G = I."""
    return torch.eye(k.numel(), dtype=k.dtype)


def _unit(x: Tensor) -> Tensor:
    x = x / x.abs().max()
    return x / x.norm()


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
    return (q / q.abs().max()).norm() / (k / k.abs().max()).norm() * (q.abs().max() / k.abs().max())


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


def diveq(k: Tensor, q: Tensor, codebook: Tensor) -> Tensor:
    """I − d̂ d̂ᵀ, d̂ = (q−k)/‖q−k‖; I where k = q."""
    eye = identity(k, q, codebook)
    if (k == q).all():
        return eye
    d = _unit(q - k)
    return eye - torch.outer(d, d)


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


def key_gradient(name: str, k: Tensor, q: Tensor, g: Tensor, codebook: Tensor) -> Tensor:
    """Gᵀg of each row in fp64: k, q, g (N, K), codebook (S, K) -> (N, K).  KeyError where no matrix is written."""
    matrix, c = MATRICES[name], codebook.double()
    rows = zip(k.double(), q.double(), g.double(), strict=True)
    return torch.stack([matrix(ki, qi, c).T @ gi for ki, qi, gi in rows])
