"""Estimators whose G is built from one key and its code: the identity, rotations, and their controls.

k̄, q̄ are the unit vectors of k, q. A rotation that takes k̄ to q̄ and leaves alone what is orthogonal to both is a
product of two reflections, R = (I − 2 q̄ q̄ᵀ)(I − 2 r rᵀ) with r = (k̄+q̄)/‖k̄+q̄‖; multiplied out it is the
I − 2 r rᵀ + 2 q̄ k̄ᵀ of Fifty 2410.06424. As a product it stays orthogonal to rounding even where r loses digits,
beside antipodal rows.

Rows for which no such map exists (a zero or non-finite vector; exactly antipodal ones where r is needed) get G = I;
no other row does. Rows are rescaled by their largest entry before anything is squared. ‖q‖/‖k‖ is lowered where
Gᵀg would not be finite in the keys' dtype.

vector-quantize-pytorch 1.32.0 computes G k as the output, so that its forward is not a code, and never divides by less
than 1e-6, so that G is another matrix for shorter vectors; its gradients agree otherwise.

Axes:  … any leading axes  K key width.  k, q (..., K) -> k̂ (..., K), forward is q.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transformer_vq.ops.estimators.noise import Source, normal
from transformer_vq.ops.estimators.through import Pulled, through
from transformer_vq.ops.numerics import Direction, direction, dot, largest_entry, length_ratio


def ste(k: Tensor, q: Tensor) -> Tensor:
    """G = I  [van den Oord 1711.00937]."""
    return through(k, q, None)


def rotation(k: Tensor, q: Tensor) -> Tensor:
    """G = (‖q‖/‖k‖) R: takes k to q, by a rotation and a ratio of lengths  [Fifty 2410.06424, table 1]."""
    return through(k, q, _rotation)


def rotation_unscaled(k: Tensor, q: Tensor) -> Tensor:
    """G = R: the angle without the ratio of lengths."""
    return through(k, q, _rotation_unscaled)


def rotation_tangent(k: Tensor, q: Tensor) -> Tensor:
    """G = (‖q‖/‖k‖) R (I − k̄ k̄ᵀ): `rotation` without the radial gradient.

    What the rotation paper's VQGAN and ViT-VQGAN code really computes (its tables 3 and 4).
    """
    return through(k, q, _rotation_tangent)


def rotation_centred(k: Tensor, q: Tensor, codebook: Tensor | None = None) -> Tensor:
    """`rotation` built from k−μ and q−μ, μ the mean of the codebook's rows: as invariant to a shift as the lookup is.

    codebook (H, S, K) for k (B, H, T, K), or (S, K) for k (..., K); without one μ is zero.
    """
    if codebook is None:
        return through(k, q, _rotation)
    if not 2 <= codebook.dim() <= k.dim() or codebook.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"codebook has shape {tuple(codebook.shape)}; keys {tuple(k.shape)} need (H, S, {k.shape[-1]})"
        )
    mean = _mean_row(codebook.detach())
    return through(k, q, _rotation_centred, mean[(None,) * (k.dim() - codebook.dim())])


def scale(k: Tensor, q: Tensor) -> Tensor:
    """G = (‖q‖/‖k‖) I: the ratio without the angle; a control for `rotation`."""
    return through(k, q, _scale)


def reflection(k: Tensor, q: Tensor) -> Tensor:
    """G = (‖q‖/‖k‖) times the Householder reflection that takes k̄ to q̄ (parallel ones: times I); a control."""
    return through(k, q, _reflection)


def random_rotation(k: Tensor, q: Tensor, generator: Source) -> Tensor:
    """G = (‖q‖/‖k‖) times a rotation by the angle of `rotation`, in a random plane through k̄; a control.

    generator: on the device of k, or a seed, or names (see noise.py); the last two let a recomputed forward pass find
    the same planes.
    """
    return through(k, q, _random_rotation, normal(k, generator))


def _rotation(k: Tensor, q: Tensor, g: Tensor) -> Pulled:
    return _rotate_back(direction(k), direction(q), g)


def _rotation_unscaled(k: Tensor, q: Tensor, g: Tensor) -> Pulled:
    back = _rotation(k, q, g)
    return back._replace(factor=torch.ones_like(back.factor))


def _rotation_tangent(k: Tensor, q: Tensor, g: Tensor) -> Pulled:
    from_, to = direction(k), direction(q)
    back = _rotate_back(from_, to, g)
    return back._replace(pulled=back.pulled - dot(from_.unit, back.pulled) * from_.unit)


def _rotation_centred(k: Tensor, q: Tensor, g: Tensor, mean: Tensor) -> Pulled:
    mean = mean.to(k.dtype)
    size = torch.maximum(torch.maximum(largest_entry(k), largest_entry(q)), largest_entry(mean))
    size = torch.where(size > 0, size, 1.0)  # a difference of two huge rows would overflow
    return _rotation(k / size - mean / size, q / size - mean / size, g)


def _scale(k: Tensor, q: Tensor, g: Tensor) -> Pulled:
    from_, to = direction(k), direction(q)
    return Pulled(g, length_ratio(to, from_), from_.ok & to.ok)


def _reflection(k: Tensor, q: Tensor, g: Tensor) -> Pulled:
    from_, to = direction(k), direction(q)
    axis, _ = _normalised(from_.unit - to.unit)  # zero for parallel rows, and then I − 2 a aᵀ is I
    return Pulled(_reflect(g, axis), length_ratio(to, from_), from_.ok & to.ok)


def _random_rotation(k: Tensor, q: Tensor, g: Tensor, noise: Tensor) -> Pulled:
    from_, to = direction(k), direction(q)
    cosine = dot(from_.unit, to.unit)
    sine = (to.unit - cosine * from_.unit).norm(dim=-1, keepdim=True)
    noise = noise.to(k.dtype)
    sideways, exists = _normalised(noise - dot(noise, from_.unit) * from_.unit)
    image, _ = _normalised(cosine * from_.unit + sine * sideways)
    return _rotate_back(from_, to._replace(unit=image, ok=to.ok & (exists | (sine == 0))), g)


def _rotate_back(from_: Direction, to: Direction, g: Tensor) -> Pulled:
    """Rᵀg, the ratio of lengths, and the rows that have an R: Rᵀ = (I − 2 r rᵀ)(I − 2 q̄ q̄ᵀ)."""
    r, apart = _normalised(from_.unit + to.unit)
    return Pulled(_reflect(_reflect(g, to.unit), r), length_ratio(to, from_), from_.ok & to.ok & apart)


def _normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums or differences of unit rows, brought to length 1, and whether that is possible, (..., K), (..., 1).

    What is left of two rows that cancel up to rounding has no direction: such a row becomes zero.
    """
    length = x.norm(dim=-1, keepdim=True)
    exists = length > 4 * torch.finfo(x.dtype).eps
    return x / torch.where(exists, length, torch.inf), exists


def _reflect(g: Tensor, axis: Tensor) -> Tensor:
    """(I − 2 a aᵀ) g for rows a of length 1."""
    return torch.addcmul(g, dot(axis, g), axis, value=-2)


def _mean_row(codebook: Tensor) -> Tensor:
    """Mean over S, (..., S, K) -> (..., 1, K), fp32 or wider; divided first, since a sum of huge rows overflows."""
    wide = torch.promote_types(codebook.dtype, torch.float32)
    return (codebook.to(wide) / codebook.shape[-2]).sum(-2, keepdim=True)
