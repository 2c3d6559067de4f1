"""From a grid of latents to codes and back: the package's quantizers, one codebook per product part and residual stage.

The whole batch is one row of keys to a quantizer: pictures are small, and one long row is looked up faster than many.

Axes:   B batch  C = H·K channels  h, w height and width of the grid  N = B·h·w  H product parts  K width of a part
        R residual stages  S codes
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformer_vq.config.images import IMAGE_ESTIMATORS, ImagesConfig
from transformer_vq.images.estimators import VALUES, sf_diveq
from transformer_vq.ops import estimators
from transformer_vq.ops.nearest import lookup
from transformer_vq.quantizers import Quantizer, build_quantizer


class Stage(NamedTuple):
    """What one codebook did: keys (1, H, N, K), codes (1, H, N), rows (1, H, N, K), detached."""

    k: Tensor
    codes: Tensor
    nearest: Tensor


class Latents(NamedTuple):
    """A quantized grid."""

    keys: Tensor
    """(B, C, h, w): what was quantized."""
    quantized: Tensor
    """(B, C, h, w): what the decoder reads; gradient by the estimator."""
    codes: Tensor
    """(B, R, H, h, w) int64."""
    loss: Tensor
    """Scalar: every auxiliary term times its weight."""
    stages: list[Stage]
    metrics: dict[str, Tensor]
    """Of this batch, `layer0/usage` and so on, a layer being a stage."""


class LatentQuantizer(nn.Module):
    """Grid in, codes out. Residual stages see what the ones before left over; the estimator acts once, on their sum.

    (Applied stage by stage, R straight-through estimators would multiply the encoder's gradient by R.)
    """

    def __init__(self, config: ImagesConfig, seed: int) -> None:
        super().__init__()
        settings = config.quantizer
        self.parts = config.product
        self.estimator = getattr(settings, "estimator", "ste")
        self.cosine = getattr(settings, "lookup", "euclidean") == "cosine"
        if self.estimator in IMAGE_ESTIMATORS:  # the module finds the codes and owns the codebook; the value is ours
            settings = settings.model_copy(update={"estimator": "ste"})
        width = config.code_dim // config.product
        self.stages = nn.ModuleList(
            build_quantizer(settings, self.parts, width, seed, layer) for layer in range(config.residual)
        )

    @property
    def quantizers(self) -> list[Quantizer]:
        """The stages, typed."""
        return [cast(Quantizer, stage) for stage in self.stages]

    @property
    def warming_up(self) -> bool:
        """True while latents pass unquantized (`start_step`)."""
        return bool(getattr(self.stages[0], "warming_up", False))

    def forward(self, z: Tensor) -> Latents:
        """z (B, C, h, w) -> `Latents`. With cosine lookup latents are normalised first, as in the rotation paper."""
        k = self._rows(z)
        if self.cosine:
            k = F.normalize(k, dim=-1)
        rest, stages, losses, metrics = k, [], [], {}
        for i, stage in enumerate(self.quantizers):
            out = stage(rest)
            losses.append(out.loss)
            metrics.update({f"layer{i}/{name}": value for name, value in out.metrics.items()})
            nearest = out.quantized.detach()
            stages.append(Stage(rest.detach(), out.codes, nearest))
            rest = rest - nearest
        if len(self.stages) > 1:
            quantized = self._estimate_sum(k, stages)
        elif self.training and not self.warming_up and self.estimator in IMAGE_ESTIMATORS:
            quantized = self._off_codebook(k, stages[0])
        else:
            quantized = out.quantized
        loss = torch.stack(losses).sum()
        return Latents(self._grid(k, z), self._grid(quantized, z), self._codes(stages, z), loss, stages, metrics)

    def rows_of(self, codes: Tensor) -> Tensor:
        """Codes (B, R, H, h, w) -> what the decoder reads, (B, C, h, w).  Raises ValueError for codes out of range."""
        B, R, H, h, w = codes.shape
        if len(self.stages) != R or self.parts != H:
            raise ValueError(f"codes {tuple(codes.shape)}: {len(self.stages)} stages of {self.parts} parts are needed")
        S = self.quantizers[0].codebook.shape[1]
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < S:
            raise ValueError(f"codes lie in {int(codes.min())}..{int(codes.max())}: there are {S}")
        rows = [lookup(stage.codebook, codes[:, i].flatten(2)) for i, stage in enumerate(self.quantizers)]
        return torch.stack(rows).sum(0).transpose(2, 3).reshape(B, -1, h, w)

    def _estimate_sum(self, k: Tensor, stages: list[Stage]) -> Tensor:
        """k̂ whose value is the sum of the stages' rows. The rows carry the codebooks' gradient where they have one."""
        rows = [lookup(q.codebook.to(k.dtype), s.codes) for q, s in zip(self.quantizers, stages, strict=True)]
        return estimators.apply(self.estimator, k, torch.stack(rows).sum(0))

    def _off_codebook(self, k: Tensor, stage: Stage) -> Tensor:
        """The image-only estimators; `exact` and `hessian` are the model's business and need the bare row here."""
        codebook = self.quantizers[0].codebook
        if self.estimator == "sf_diveq":
            return sf_diveq(k, codebook)[0]
        if self.estimator in VALUES:
            return VALUES[self.estimator](k, lookup(codebook.to(k.dtype), stage.codes))
        return stage.nearest

    def _rows(self, z: Tensor) -> Tensor:
        """(B, H·K, h, w) -> (1, H, N, K)."""
        return z.unflatten(1, (self.parts, -1)).permute(1, 0, 3, 4, 2).flatten(1, 3)[None].contiguous()

    def _grid(self, k: Tensor, like: Tensor) -> Tensor:
        """(1, H, N, K) -> (B, H·K, h, w)."""
        B, _, h, w = like.shape
        return k[0].unflatten(1, (B, h, w)).permute(1, 0, 4, 2, 3).flatten(1, 2).contiguous()

    def _codes(self, stages: list[Stage], like: Tensor) -> Tensor:
        """-> (B, R, H, h, w); without a codebook (B, R, H, 0, 0)."""
        codes = torch.stack([s.codes[0] for s in stages])  # (R, H, N)
        B, _, h, w = like.shape
        if not codes.numel():
            return codes.new_empty(B, *codes.shape[:2], 0, 0)
        return codes.unflatten(2, (B, h, w)).permute(2, 0, 1, 3, 4).contiguous()
