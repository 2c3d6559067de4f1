"""Images per second of a VQ-VAE's training step with our quantizer and with vector-quantize-pytorch's, side by side.

The same encoder, decoder, batch, optimizer, codes, rotation estimator, Euclidean lookup, commitment term and EMA; the
two take turns in one process, so that a busy machine slows both. Medians over the turns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from transformer_vq.bench.device import kind
from transformer_vq.bench.turns import in_turns, quartiles, ratios, shown_speedup, spread
from transformer_vq.config.extras import need
from transformer_vq.config.images import ImagesConfig
from transformer_vq.config.quantizer import VQConfig
from transformer_vq.images.model import ImageModel

SIDE = 32
CHANNELS = 3
EMA = 0.8  # that package's default


def run(
    codes: int = 1024,
    code_dim: int = 32,
    width: int = 16,
    batch_size: int = 64,
    repeats: int = 9,
    device: str | None = None,
) -> list[dict[str, str | float]]:
    """-> a row each for ours and theirs: implementation, images_per_s, speedup over theirs, and quartiles (low, high;
    speedup_low, speedup_high).

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
    pictures = torch.rand(batch_size, CHANNELS, SIDE, SIDE, device=device) * 2 - 1

    def our_loss() -> Tensor:
        out = ours(pictures)
        loss: Tensor = out.loss + out.latents.loss
        return loss

    def their_loss() -> Tensor:
        quantized, _, commitment = theirs(rest.encoder(pictures))
        loss: Tensor = rest.criterion(rest.decoder(quantized), pictures) + commitment.sum()
        return loss

    steps = {
        "transformer_vq": _step(our_loss, ours, ours.apply_codebook_statistics),
        "vector-quantize-pytorch": _step(their_loss, nn.ModuleList([rest.encoder, rest.decoder]), lambda: None),
    }
    seconds = in_turns(steps, repeats, device)
    theirs = seconds["vector-quantize-pytorch"]
    return [
        {
            "implementation": name,
            **spread("images_per_s", "low", "high", quartiles([batch_size / t for t in seconds[name]])),
            **spread(
                "speedup", "speedup_low", "speedup_high", ratios(seconds["vector-quantize-pytorch"], seconds[name])
            ),
        }
        for name in steps
    ]


def table(rows: list[dict[str, str | float]], title: str) -> None:
    """Print the rows."""
    from rich.console import Console
    from rich.table import Table

    shown = Table("implementation", "images/s (median)", "speed over theirs", "quartiles", title=title)
    for row in rows:
        shown.add_row(str(row["implementation"]), f"{row['images_per_s']:.0f}", *shown_speedup(row))
    Console().print(shown)


def _step(loss: Callable[[], Tensor], module: nn.Module, after: Callable[[], None]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        after()

    return step
