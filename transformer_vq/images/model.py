"""The VQ-VAE: encoder, quantizer, decoder, and the reconstruction loss.

The estimators `exact` and `hessian` work on the loss as a function of what is decoded, see `ops/estimators/twice.py`.

Axes:   B batch  C channels  h, w height and width
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformer_vq.config.images import TWICE_DECODED, ImagesConfig
from transformer_vq.images.networks import Decoder, Encoder, PictureDropout
from transformer_vq.images.quantize import LatentQuantizer, Latents
from transformer_vq.ops import counter, estimators
from transformer_vq.quantizers.seeds import seed_number


class Reconstruction(NamedTuple):
    """What a forward pass gives."""

    pictures: Tensor
    """(B, C, h, w) in the range of the input, not clipped."""
    loss: Tensor
    """Scalar reconstruction loss. With `exact` and `hessian` its gradient at the latents is theirs."""
    latents: Latents


class ImageModel(nn.Module):
    """A convolutional autoencoder with a quantized grid between its halves."""

    def __init__(self, config: ImagesConfig, channels: int, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        at = config.latent_channels or config.code_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            shape = (channels * config.patch**2, at, config.width, config.multipliers, config.blocks)
            rest = (config.attention, config.dropout)
            projected = at != config.code_dim
            into = nn.Conv2d(at, config.code_dim, 1) if projected else nn.Identity()
            back = nn.Conv2d(config.code_dim, at, 1) if projected else nn.Identity()
            self.encoder = nn.Sequential(nn.PixelUnshuffle(config.patch), Encoder(*shape, *rest), into)
            self.decoder = nn.Sequential(back, Decoder(*shape, *rest), nn.PixelShuffle(config.patch))
        self.quantizer = LatentQuantizer(config, seed)
        self.seed, self.rows_named = seed, False
        self.noise, self.first_row = (torch.zeros((), dtype=torch.int64, device="cpu") for _ in range(2))
        self.dropouts = [module for module in self.modules() if isinstance(module, PictureDropout) and module.p > 0]

    def forward(self, pictures: Tensor) -> Reconstruction:
        """pictures (B, C, h, w), -1 to 1."""
        if self.training and self.dropouts:
            seed = self.noise if self.rows_named else torch.randint(2**62, (), device=pictures.device)
            rows = self.first_row + torch.arange(len(pictures), device=pictures.device)
            states = counter.row_states(seed, rows)
            for place, dropout in enumerate(self.dropouts):
                dropout.states = counter.bits(states, torch.tensor(place, device=pictures.device))
        latents = self.quantizer(self.encoder(pictures))
        if self.training and self.quantizer.estimator in TWICE_DECODED and not self.quantizer.warming_up:
            return self._decode_twice(pictures, latents)
        decoded = self.decoder(latents.quantized)
        return Reconstruction(decoded, self.criterion(decoded, pictures), latents)

    def encode(self, pictures: Tensor) -> Tensor:
        """pictures (B, C, h, w), -1 to 1 -> codes (B, R, H, h', w')."""
        codes: Tensor = self.quantizer(self.encoder(pictures)).codes
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, R, H, h', w') -> pictures (B, C, h, w), not clipped."""
        rows = self.quantizer.rows_of(codes)
        decoded: Tensor = self.decoder(rows.to(self.last_layer.dtype))
        return decoded

    def criterion(self, decoded: Tensor, pictures: Tensor) -> Tensor:
        """Mean over everything, fp32 or wider."""
        decoded = decoded.to(torch.promote_types(decoded.dtype, torch.float32))
        loss = F.mse_loss if self.config.reconstruction == "mse" else F.l1_loss
        return loss(decoded, pictures)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution."""
        return cast(Decoder, self.decoder[1])[-1].weight  # type: ignore[return-value]

    def set_step(self, step: int) -> None:
        """Tell the optimizer step, on which schedules and noise depend."""
        self.noise.fill_(seed_number(self.seed, step, "dropout"))
        self.quantizer.set_step(step)

    def set_rows(self, first_row: int) -> None:
        """Tell which row of the step's batch the next calls' first picture is: all noise follows from step and row.

        It must not change between a forward pass and its backward pass.
        """
        self.rows_named = True
        self.first_row.fill_(first_row)
        self.quantizer.set_rows(first_row)

    def apply_codebook_statistics(self) -> None:
        """Move the codebooks by what forward passes in training collected: once per optimizer step."""
        for stage in self.quantizer.quantizers:
            stage.apply_codebook_statistics()

    def _decode_twice(self, pictures: Tensor, latents: Latents) -> Reconstruction:
        decoded: list[Tensor] = []

        def loss(at: Tensor) -> Tensor:
            decoded.append(self.decoder(at))
            return self.criterion(decoded[-1], pictures)

        estimator = estimators.LOSS_ESTIMATORS[self.quantizer.estimator]
        value = estimator(latents.keys, latents.quantized, loss)
        return Reconstruction(decoded[-1], value, latents)  # the last one was decoded from the codes
