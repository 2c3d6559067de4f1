"""How much memory an image run takes: its networks run one step on fake tensors, as the task runs them.

Evaluation comes on top only where its batches are much larger than those of training; it keeps nothing for a backward
pass. Classifiers and networks that measure distances in the end are not counted.

Axes:   B batch  C channels  h, w height and width
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from transformer_vq.config.images import ImageRunConfig, ImagesConfig
from transformer_vq.images.adversary import discriminator_term, generator_term
from transformer_vq.images.batches import to_unit
from transformer_vq.images.model import ImageModel
from transformer_vq.images.networks import PatchDiscriminator
from transformer_vq.images.pictures import Shape
from transformer_vq.training.memory import cut, needed_where_close, warning
from transformer_vq.training.whole_step import WholeStep, whole_step

AUTOENCODER, DISCRIMINATOR = "model", "discriminator"
ADVICE = "a smaller train.micro_batch takes less, with the same result"


def step_memory(
    config: ImageRunConfig, shape: Shape, device: str, processes: int = 1, perceptual: nn.Module | None = None
) -> WholeStep:
    """Of one of `processes` on a `device` (cpu, cuda), quantizers as after their start.

    perceptual: the network of that loss, where there is one.
    """
    images, gan, perceptual = config.images, config.images.gan, copy.deepcopy(perceptual)  # its tensors become fake
    with torch.device("meta"):
        model = ImageModel(started(images), shape.channels)
        players: dict[str, nn.Module] = {AUTOENCODER: model}
        if gan is not None:
            players[DISCRIMINATOR] = PatchDiscriminator(shape.channels, gan.width, gan.layers)
    judge = players.get(DISCRIMINATOR)
    decoded: list[Tensor] = []  # from the autoencoder's turn for the discriminator's

    def loss(player: str, rows: int) -> Tensor:
        raw = torch.empty(rows, *shape, dtype=torch.uint8)
        pictures = to_unit(raw).to(model.last_layer.dtype)
        if player == DISCRIMINATOR:
            assert judge is not None and gan is not None
            on_real, on_fake = judge(torch.cat([pictures, decoded.pop()])).chunk(2)
            return discriminator_term(on_real, on_fake, gan.loss)
        out = model(pictures)
        fidelity = out.loss
        if perceptual is not None:
            fidelity = fidelity + images.perceptual_weight * perceptual(pictures, out.pictures)
        total: Tensor = fidelity + out.latents.loss
        if judge is not None and gan is not None:
            total = total + generator_term(judge, out.pictures, fidelity, model.last_layer, gan)[0]
            decoded.append(out.pictures.detach())
        return total

    return whole_step(players, loss, config.train, device, processes, perceptual)


def started(images: ImagesConfig) -> ImagesConfig:
    """Quantizers as after their start: nothing waits for latents."""
    over = {"start_step": 0, "init": "normal"}
    present = {name: value for name, value in over.items() if hasattr(images.quantizer, name)}
    return images.model_copy(update={"quantizer": images.quantizer.model_copy(update=present)})


def complaint(
    config: ImageRunConfig, shape: Shape, device: str, processes: int = 1, perceptual: nn.Module | None = None
) -> str | None:
    """One line where the run takes more than there is; None where it fits or nobody can tell."""
    needed = needed_where_close(
        roughly(config, shape, processes),
        lambda: step_memory(config, shape, device, processes, perceptual).total,
        device,
        processes,
    )
    return warning("a step", needed, device, ADVICE)


def roughly(config: ImageRunConfig, shape: Shape, processes: int = 1) -> int:
    """More than a step takes, most likely; at no cost."""
    images, (rows, _) = config.images, cut(config.train, processes)
    cells = shape.height * shape.width // images.patch**2
    blocks, last = 2 * images.blocks + 3, len(images.multipliers) - 1
    numbers = weights = 0
    for level, factor in enumerate(images.multipliers):
        width, places = images.width * factor, cells // 4**level
        numbers += 8 * blocks * width * places + (4 * places**2 if level == last and images.attention != "none" else 0)
        weights += 20 * blocks * width**2
    if (gan := images.gan) is not None:
        numbers += 8 * gan.width * shape.height * shape.width
        weights += 16 * (8 * gan.width) ** 2 * gan.layers
    if images.perceptual_weight:
        numbers += 4 * 64 * 8 * shape.height * shape.width
        weights += 15_000_000
    codes = getattr(images.quantizer, "size", 0) * images.code_dim * images.residual
    return 8 * (rows * (numbers + 20 * shape.bytes) + 6 * (weights + codes)) + 2**27
