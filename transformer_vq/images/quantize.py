"""From a grid of latents to codes and back: the package's quantizers, one codebook per product part and residual stage.

The whole batch is one row of keys to a quantizer: pictures are small, and one long row is looked up faster than many.

Axes:   B batch  C = H·K channels  h, w height and width of the grid  N = B·h·w  H product parts  K width of a part
        R residual stages  S codes
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from transformer_vq.config.images import IMAGE_ESTIMATORS, OFF_CODEBOOK, ImagesConfig
from transformer_vq.ops import estimators
from transformer_vq.ops.estimators.noise import named
from transformer_vq.ops.nearest import lookup
from transformer_vq.quantizers import Quantized, Quantizer, build_quantizer
from transformer_vq.quantizers.seeds import seed_number


class Stage(NamedTuple):
    """What one codebook did with its keys (1, H, N, K): codes (1, H, N), rows (1, H, N, K), losses."""

    k: Tensor
    result: Quantized


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
        self.parts, self.seed = config.product, seed
        self.noise, self.first_row = (torch.zeros((), dtype=torch.int64, device="cpu") for _ in range(2))
        self.estimator = getattr(settings, "estimator", "ste")
        self.temperature, self.alpha = getattr(settings, "temperature", 1.0), getattr(settings, "alpha", 1.0)
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
        return self.quantizers[0].warming_up

    def forward(self, z: Tensor) -> Latents:
        """z (B, C, h, w) -> `Latents`. With cosine lookup latents are normalised first, as in the rotation paper."""
        k = self._rows(z)
        if self.cosine:
            k = F.normalize(k, dim=-1)
        rest, stages = k, []
        self._name_cells(z.shape[2] * z.shape[3])
        for quantizer in self.quantizers:
            stages.append(Stage(rest, quantizer(rest)))
            rest = rest - stages[-1].result.quantized.detach()
        if len(self.stages) > 1:
            quantized = self._estimate(
                k, [(q.codebook, s.result.codes) for q, s in zip(self.quantizers, stages, strict=True)]
            )
        elif self.training and not self.warming_up and self.estimator in OFF_CODEBOOK:
            quantized = self._estimate(k, [(self.quantizers[0].codebook, stages[0].result.codes)])
        else:
            quantized = stages[0].result.quantized
        loss = torch.stack([stage.result.loss for stage in stages]).sum()
        metrics = {f"layer{i}/{name}": x for i, s in enumerate(stages) for name, x in s.result.metrics.items()}
        return Latents(self._grid(k, z), self._grid(quantized, z), self._codes(stages, z), loss, stages, metrics)

    def rows_of(self, codes: Tensor) -> Tensor:
        """Codes (B, R, H, h, w) -> what the decoder reads, (B, C, h, w).  Raises ValueError for codes out of range."""
        _, R, H, h, w = codes.shape
        if len(self.stages) != R or self.parts != H:
            raise ValueError(f"codes {tuple(codes.shape)}: {len(self.stages)} stages of {self.parts} parts are needed")
        S = self.quantizers[0].codebook.shape[1]
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < S:
            raise ValueError(f"codes lie in {int(codes.min())}..{int(codes.max())}: there are {S}")
        rows = [lookup(stage.codebook, codes[:, i].flatten(2)) for i, stage in enumerate(self.quantizers)]
        return rearrange(torch.stack(rows).sum(0), "b part (h w) k -> b (part k) h w", h=h, w=w)

    def set_step(self, step: int) -> None:
        """Tell the stages the optimizer step; the noise of this step depends on seed, step and cell of the batch."""
        self.noise.fill_(seed_number(self.seed, step, "image estimator"))
        for stage in self.quantizers:
            stage.set_step(step)

    def set_rows(self, first_row: int) -> None:
        """Tell which row of the step's batch the next forward passes' first picture is."""
        self.first_row.fill_(first_row)

    def _name_cells(self, cells: int) -> None:
        """The batch is one row to a stage; a picture's cells have their places in that of the whole step."""
        for stage in self.quantizers:
            stage.set_rows(0, self.first_row * cells)
        self.first_cell = self.first_row * cells

    def _estimate(self, k: Tensor, chosen: list[tuple[Tensor, Tensor]]) -> Tensor:
        """k̂ of k (1, H, N, K) and the sum of the rows that codebooks (H, S, K) and codes (1, H, N) name.

        The rows carry the gradient of a codebook that has one.
        """
        noise = named(self.noise, torch.zeros_like(self.first_row), self.first_cell, k)
        books = [book.to(k.dtype) for book, _ in chosen]
        q = torch.stack([lookup(book, codes) for book, (_, codes) in zip(books, chosen, strict=True)]).sum(0)
        codebook, codes = (books[0], chosen[0][1]) if len(chosen) == 1 else (None, None)
        return estimators.apply(self.estimator, k, q, codebook, codes, noise, self.temperature, self.alpha)

    def _rows(self, z: Tensor) -> Tensor:
        """(B, H·K, h, w) -> (1, H, N, K)."""
        return rearrange(z, "b (part k) h w -> 1 part (b h w) k", part=self.parts).contiguous()

    def _grid(self, k: Tensor, like: Tensor) -> Tensor:
        """(1, H, N, K) -> (B, H·K, h, w)."""
        B, _, h, w = like.shape
        return rearrange(k, "1 part (b h w) k -> b (part k) h w", b=B, h=h, w=w).contiguous()

    def _codes(self, stages: list[Stage], like: Tensor) -> Tensor:
        """-> (B, R, H, h, w); without a codebook (B, R, H, 0, 0)."""
        codes = torch.stack([s.result.codes[0] for s in stages])  # (R, H, N)
        B, _, h, w = like.shape
        if not codes.numel():
            return codes.new_empty(B, *codes.shape[:2], 0, 0)
        return rearrange(codes, "stage part (b h w) -> b stage part h w", b=B, h=h, w=w).contiguous()
