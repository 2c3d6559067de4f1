"""A VQ-VAE's training step with our quantizer and with vector-quantize-pytorch's, side by side, and images per second.

The same encoder, decoder, batch, optimizer, codes, rotation estimator, Euclidean lookup, commitment term and EMA; the
two take turns in one process, so that a busy machine slows both. Medians over the turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from transformer_vq.bench import work
from transformer_vq.bench.comparison import OURS, Row, row
from transformer_vq.bench.device import kind
from transformer_vq.bench.quantize import THEIRS
from transformer_vq.bench.turns import in_turns
from transformer_vq.config.extras import need
from transformer_vq.config.images import ImagesConfig
from transformer_vq.config.quantizer import VQConfig
from transformer_vq.images.model import ImageModel

SIDE = 32
CHANNELS = 3
EMA = 0.8  # that package's default

TYPE: str | None = "fp32"
"""Of its products, where no option says it; None: fp32 on a CPU, bf16 on a GPU."""
AXIS = "batch_size"
MORE = {"images_per_s": ("images/s", ",.0f"), "gflop": ("GFLOP", ",.1f")}


def run(
    codes: int = 1024,
    code_dim: int = 32,
    width: int = 16,
    batch_sizes: Sequence[int] = (16, 64, 256),
    repeats: int = 9,
    device: str | None = None,
) -> list[Row]:
    """-> a row each size of a batch, as in `comparison.py`, with images_per_s of either side.

    32x32 colour pictures to a 16x16 grid of codes, fp32; a step is forward, backward, AdamW and the EMA. `device` is
    the GPU where there is one, else the CPU.
    Raises ConfigError when the other package is not installed.
    """
    VectorQuantize = need("vector_quantize_pytorch", "bench images").VectorQuantize
    device = device or kind()
    quantizer = VQConfig(codes=codes, estimator="rotation", ema=EMA, commit=1 / code_dim)
    config = ImagesConfig(width=width, multipliers=[1, 2], code_dim=code_dim, quantizer=quantizer)
    ours, rest = (ImageModel(config, CHANNELS).to(device).train() for _ in range(2))
    theirs = VectorQuantize(
        dim=code_dim, codebook_size=codes, decay=EMA, commitment_weight=1.0, rotation_trick=True, accept_image_fmap=True
    ).to(device)  # its commitment term is a mean over the width

    def our_loss(pictures: Tensor) -> Tensor:
        out = ours(pictures)
        loss: Tensor = out.loss + out.latents.loss
        return loss

    def their_loss(pictures: Tensor) -> Tensor:
        quantized, _, commitment = theirs(rest.encoder(pictures))
        loss: Tensor = rest.criterion(rest.decoder(quantized), pictures) + commitment.sum()
        return loss

    our_optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-4)
    their_optimizer = torch.optim.AdamW(nn.ModuleList([rest.encoder, rest.decoder]).parameters(), lr=1e-4)
    found = []
    for size in batch_sizes:
        pictures = torch.rand(size, CHANNELS, SIDE, SIDE, device=device) * 2 - 1
        steps = {
            OURS: _step(our_loss, pictures, our_optimizer, ours.apply_codebook_statistics),
            THEIRS: _step(their_loss, pictures, their_optimizer, lambda: None),
        }
        seconds = in_turns(steps, repeats, device)
        made = row(AXIS, size, seconds, _work(ours, pictures, steps[OURS], codes, code_dim), {})
        for its in (made, made["others"][THEIRS]):
            its["images_per_s"] = size / (its["milliseconds"] / 1e3)
        found.append(made)
    return found


def _work(model: nn.Module, pictures: Tensor, step: Callable[[], None], codes: int, dim: int) -> work.Work:
    """Convolutions as PyTorch counts them, and the lookup, which it does not see: a key for four pixels."""
    with FlopCounterMode(display=False) as counter:
        step()
    lookup = work.quantizer(len(pictures) * (SIDE // 2) ** 2, dim, codes).flops
    parameters = sum(p.numel() for p in model.parameters())
    return work.Work(counter.get_total_flops() + lookup, work.optimizer(parameters) + pictures.nbytes)


def _step(
    loss: Callable[[Tensor], Tensor], pictures: Tensor, optimizer: torch.optim.Optimizer, after: Callable[[], None]
) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        loss(pictures).backward()
        optimizer.step()
        after()

    return step
