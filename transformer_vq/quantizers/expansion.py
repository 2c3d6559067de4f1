"""The learned maps around a lookup-free quantizer, one per head: K → d before rounding, d → K after it.

Axes:  B batch (absent for codes)  H heads  T tokens  K key width  d rounded dimensions
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformer_vq.ops.numerics import full_precision, wide_dtype
from transformer_vq.quantizers.seeds import seeded


class Projection(nn.Module):
    """z = W k, (B, H, T, K) -> (B, H, T, d), fp32 or wider.

    W starts with orthonormal rows (columns where d > K) times K^(1/4): the paper's keys have ‖k‖² = √K, so each z then
    has unit variance and takes several levels from the first step on.
    """

    def __init__(self, heads: int, dim: int, d: int, seed: int, layer: int) -> None:
        super().__init__()
        generator = seeded(seed, layer, "projection")
        narrow = torch.get_default_dtype()
        rows = torch.empty(heads, d, dim, dtype=torch.promote_types(narrow, torch.float32))  # the QR needs it
        for head in rows:
            nn.init.orthogonal_(head, gain=dim**0.25, generator=generator)
        self.weight = nn.Parameter(rows.to(narrow))

    def forward(self, k: Tensor) -> Tensor:
        """See the class. In full precision: a rounded product may round to another level."""
        wide = wide_dtype(k, self.weight)
        with full_precision(k.device):
            return torch.einsum("bhtk,hdk->bhtd", k.to(wide), self.weight.to(wide))


class Expansion(nn.Module):
    """Values to keys, (B, H, T, d) -> (B, H, T, K), or (H, S, d) -> (H, S, K) for a codebook.

    linear: W x + b, starting as the transpose of the projection, so that k̂ starts as k within its d dimensions;
    keys then have rank d. mlp: two layers with GELU between and K hidden units, of full rank.
    """

    def __init__(self, projection: Projection, kind: str, seed: int, layer: int) -> None:
        super().__init__()
        heads, d, dim = projection.weight.shape
        self.inner: nn.Parameter | None = None
        self.inner_bias: nn.Parameter | None = None
        if kind == "mlp":
            generator = seeded(seed, layer, "expansion")
            self.inner = nn.Parameter(torch.randn(heads, d, dim, generator=generator) * d**-0.5)
            self.inner_bias = nn.Parameter(torch.zeros(heads, dim))
            # GELU keeps about 0.4 of the variance; rows then have length K^(1/4) as the paper's keys
            outer = torch.randn(heads, dim, dim, generator=generator) * (0.4 * dim) ** -0.5 * dim**-0.25
        else:
            outer = projection.weight.detach() / dim**0.5
        self.weight = nn.Parameter(outer.clone())
        self.bias = nn.Parameter(torch.zeros(heads, dim))

    def forward(self, x: Tensor) -> Tensor:
        """See the class. In full precision, so that the codebook is the same under autocast."""
        wide = wide_dtype(x, self.weight)
        x = x.to(wide)
        with full_precision(x.device):
            if self.inner is not None and self.inner_bias is not None:
                x = F.gelu(x @ self.inner.to(wide) + self.inner_bias.to(wide)[:, None])
            return x @ self.weight.to(wide) + self.bias.to(wide)[:, None]
