"""From a key to its code: the angle between them and the ratio of their lengths, what `rotation` turns and scales by.

The angle is 2·atan2(‖k̄ − q̄‖, ‖k̄ + q̄‖) of the unit vectors, which keeps its digits where the arc cosine loses
them, beside 0 and π  [Kahan 2006].  Axes:  … any leading axes  K key width
"""

from __future__ import annotations

import torch
from torch import Tensor

from transformer_vq.ops.numerics import direction, length_ratio, wide_dtype


@torch.no_grad()
def turn(k: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """k, q (..., K) -> angle in radians, 0 … π, and ‖q‖/‖k‖, (...) each, fp32 or wider.

    Where a row is zero or not finite there is no angle: NaN, and the ratio is 1.
    """
    wide = wide_dtype(k, q)
    from_, to = direction(k.to(wide)), direction(q.to(wide))
    apart, together = ((to.unit + sign * from_.unit).norm(dim=-1) for sign in (-1, 1))
    angle = 2 * torch.atan2(apart, together)
    return angle.masked_fill(~(from_.ok & to.ok)[..., 0], torch.nan), length_ratio(to, from_)[..., 0]
