"""The image task: a VQ-VAE, or a VQ-GAN whose discriminator is a second player, for the one training loop.

Loss terms of the autoencoder: `reconstruction`, `quantizers`, and with a VQ-GAN `perceptual` and `generator`.

Axes:   B batch  C channels  h, w height and width
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from transformer_vq.config import ConfigError, load_config
from transformer_vq.config.images import ImageRunConfig, ImagesConfig, check_grid, check_packages
from transformer_vq.config.quantizer import NoneConfig, VQConfig
from transformer_vq.files import write_text
from transformer_vq.images.adversary import discriminator_term, generator_term
from transformer_vq.images.batches import image_batch, positions, to_unit
from transformer_vq.images.distances import LPIPS_SIDE, Distance, Lpips, Unobtainable, plan
from transformer_vq.images.metrics import SSIM_SIDE, CodeMeter, evaluate_split, reconstruct
from transformer_vq.images.model import ImageModel
from transformer_vq.images.networks import PatchDiscriminator, norm, patches
from transformer_vq.images.plots import write_curves, write_reconstructions, write_usage
from transformer_vq.images.sources import ImageCorpus, open_corpus
from transformer_vq.ops import estimators
from transformer_vq.quantizers import Quantizer
from transformer_vq.training import Losses, MicroBatch, Player, Task, train
from transformer_vq.training.distributed import on_main

AUTOENCODER, DISCRIMINATOR = "model", "discriminator"
SHOWN = 10  # pictures of the test split in the grid of reconstructions


class ImageTask(Task):
    """Trains an `ImageModel` by an `ImageRunConfig`."""

    unit = "images"
    primary = "mse"

    def __init__(self, config: ImageRunConfig, device: torch.device) -> None:
        """Open the pictures, see what can be measured on them, and make the networks.

        Raises ConfigError when data and config do not fit together.
        """
        check_packages()
        self.config, self.device = config, device
        settings = config.images
        check_estimator(settings)
        self.corpus: ImageCorpus = open_corpus(config.data)
        check_fits(config, self.corpus)
        self.plan = plan(config.eval, self.corpus, config.data.cache)
        small = min(self.corpus.shape[1:]) < SSIM_SIDE
        self.unmeasured = [f"no ssim: it needs {SSIM_SIDE} pixels a side"] if small else []
        self.notes = [*self.corpus.notes, *self.unmeasured, *self.plan.notes]
        channels = self.corpus.shape.channels
        self.model = ImageModel(settings, channels, config.seed)
        starts_late = bool(getattr(settings.quantizer, "start_step", 0))
        self.players = {AUTOENCODER: Player(self.model, config.train, partly_used=starts_late)}
        self.discriminator: nn.Module | None = None
        if settings.gan is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed + 1)
                self.discriminator = PatchDiscriminator(channels, settings.gan.width, settings.gan.layers)
            self.players[DISCRIMINATOR] = Player(self.discriminator, config.train)
        self.perceptual = self._lpips()
        self.step = 0
        self.fakes: dict[int, Tensor] = {}  # by micro-batch, from the autoencoder's turn for the discriminator's
        self.test_codes: CodeMeter | None = None

    def _lpips(self) -> Lpips | None:
        if not self.config.images.perceptual_weight:
            return None
        if min(self.corpus.shape[1:]) < LPIPS_SIDE:
            self.notes.append(f"no perceptual loss: LPIPS needs {LPIPS_SIDE} pixels a side")
            return None
        try:
            return Lpips().to(self.device)
        except Unobtainable as reason:
            self.notes.append(f"no perceptual loss: {reason}")
            return None

    def describe(self) -> dict[str, str]:
        """What is about to be trained."""
        images, shape = self.config.images, self.corpus.shape
        q = images.quantizer
        codes = "not quantized" if isinstance(q, NoneConfig) else f"{q.kind} of {q.size} codes"
        copies = "".join(
            f", {n} {name}" for n, name in ((images.residual, "stages"), (images.product, "parts")) if n > 1
        )
        grid = f"{shape.height // images.factor}x{shape.width // images.factor}x{images.code_dim}"
        parameters = sum(p.numel() for p in self.model.parameters())
        return {
            "data": self.corpus.describe(),
            **({"note": "; ".join(self.notes)} if self.notes else {}),
            "model": f"{'VQ-GAN' if images.gan else 'VQ-VAE'}, grid {grid}, {codes}{copies}, {parameters:,} parameters",
        }

    def begin(self, folder: Path) -> None:
        """Which pictures these were, for whoever reads the numbers later."""
        corpus = self.corpus
        about = {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "shape": list(corpus.shape),
            "splits": {name: len(split) for name, split in corpus.splits.items()},
            "notes": self.notes,
        }
        write_text(folder / "data.json", json.dumps(about, indent=1))

    def fingerprint(self) -> dict[str, str]:
        """Of the pictures."""
        return {"pictures": self.corpus.sha256}

    def batch(self, step: int, rows: range, slot: int) -> MicroBatch:
        """Rows of the train split, augmented, uint8 on the device."""
        data, settings = self.config.data, self.config.train
        split = self.corpus.splits["train"]
        raw = image_batch(split, self.config.seed, step, rows, settings.batch_size, data.flip, data.shift)
        terms = ["reconstruction", "quantizers"]
        terms += ["perceptual"] if self.perceptual is not None else []
        terms += ["generator", "discriminator"] if self.discriminator is not None else []
        return MicroBatch(raw.to(self.device), dict.fromkeys(terms, len(rows)), len(rows), slot)

    def losses(self, player: str, module: nn.Module, batch: MicroBatch) -> Losses:
        """The turn of one player on a micro-batch."""
        pictures = to_unit(batch.inputs).to(self.model.last_layer.dtype)
        if player == DISCRIMINATOR:
            return self._discriminate(module, pictures, batch.slot)
        out = module(pictures)
        terms = {"reconstruction": out.loss, "quantizers": out.latents.loss}
        metrics = dict(out.latents.metrics)
        fidelity = out.loss
        if self.perceptual is not None:
            terms["perceptual"] = self.config.images.perceptual_weight * self.perceptual(pictures, out.pictures)
            fidelity = fidelity + terms["perceptual"]
        gan = self.config.images.gan
        if gan is not None and self.discriminator is not None:
            weight = torch.zeros_like(out.loss)
            terms["generator"] = weight
            if self.step >= gan.start:
                terms["generator"], weight = generator_term(
                    self.discriminator, out.pictures, fidelity, self.model.last_layer, gan
                )
            self.fakes[batch.slot] = out.pictures.detach()
            metrics["gan_weight"] = weight.detach()
        return Losses(terms, metrics)

    def _discriminate(self, module: nn.Module, pictures: Tensor, slot: int) -> Losses:
        gan, fake = self.config.images.gan, self.fakes.pop(slot)
        assert gan is not None
        if self.step < gan.start:
            return Losses({})
        on_real, on_fake = module(torch.cat([pictures, fake])).chunk(2)  # one call: distributed training counts them
        right = 0.5 * ((on_real > 0).double().mean() + (on_fake < 0).double().mean())
        return Losses({"discriminator": discriminator_term(on_real, on_fake, gan.loss)}, {"accuracy": right})

    def set_step(self, step: int) -> None:
        """Quantizers have schedules, the discriminator a start."""
        self.step = step
        self.model.set_step(step)

    def set_rows(self, first_row: int) -> None:
        """Noise goes by row of the batch."""
        self.model.set_rows(first_row)

    def after_update(self, player: str) -> None:
        """Once per optimizer step, over all micro-batches and processes."""
        if player == AUTOENCODER:
            self.model.apply_codebook_statistics()

    def evaluate(self, split: str, final: bool) -> dict[str, Any]:
        """See metrics.py. Distances that need a network are measured once, on the test split at the end."""
        settings = self.config.eval
        measured = final and split == "test"
        also: list[Distance] = self.plan.make(self.device) if measured else []
        notes = [*self.unmeasured, *(self.plan.notes if measured else [])] if final else []
        limit = None if final else settings.max_images
        pictures = self.corpus.splits[split]
        numbers, codes = evaluate_split(self.model, pictures, settings.batch_size, limit, also, self.check_stop)
        if split == "test":
            self.test_codes = codes
        return {**numbers, **({"notes": "; ".join(notes)} if notes else {})}

    def quantizers(self) -> dict[str, Quantizer]:
        """One a residual stage."""
        latents = self.model.quantizer
        return {} if latents.warming_up else {f"layer{i}": stage for i, stage in enumerate(latents.quantizers)}

    def identify(self, step: int, rows: range) -> str:
        """The rows, and which pictures of the train split these are."""
        n = len(self.corpus.splits["train"])
        index = positions(n, self.config.seed, step, rows, self.config.train.batch_size)
        places = ", ".join(str(i) for i in index[:8]) + (", ..." if len(index) > 8 else "")
        return f"rows {rows.start}-{rows.stop - 1} of step {step}, pictures {places} of {self.corpus.name}"

    def warm_start(self, weights: dict[str, Tensor], run: Path) -> list[str]:
        """Take every tensor whose name and shape are ours; the quantizer is taken whole, from one of its kind, or not.

        One with a `start_step` is not taken: it begins unquantized, and with a codebook from the latents of its start.
        """
        theirs, ours = load_config(run, [], ImageRunConfig).images.quantizer, self.config.images.quantizer
        state = self.model.state_dict()
        fits = {name for name, tensor in weights.items() if name in state and state[name].shape == tensor.shape}
        quantizer = {name for name in (*state, *weights) if name.startswith("quantizer.")}
        fresh = self.config.train.init_quantizers == "fresh" or bool(getattr(ours, "start_step", 0))
        if fresh or theirs.kind != ours.kind or not {n for n in quantizer if not n.endswith(".age")} <= fits:
            fits -= quantizer
        taken = {name: tensor for name, tensor in weights.items() if name in fits}
        if not taken:
            raise ConfigError(f"train.init_from = {run}: no tensor there has the name and shape of one of this model's")
        self.model.load_state_dict(taken, strict=False)
        return [f"{len(taken)} tensors are taken", f"{len(state) - len(taken)} start fresh"]

    def finish(self, folder: Path) -> None:
        """Pictures of the run."""
        test = self.corpus.splits["test"]
        real = test.read(np.arange(min(SHOWN, len(test))))
        fake = reconstruct(self.model, torch.from_numpy(real)).numpy()
        write_reconstructions(real, fake, folder / "plots" / "reconstructions.png")
        if self.test_codes is not None and self.test_codes.stages:
            write_usage(self.test_codes.histograms(), folder / "plots" / "code_usage.png")
        write_curves(folder)


def run(config: ImageRunConfig, resume: bool = False, overwrite: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train the image model that `config` describes and return its summary; see `train` for the rules and errors."""

    def make(accelerator: Accelerator) -> ImageTask:
        if accelerator.num_processes > 1:
            # one process downloads, the others find it
            on_main(accelerator, lambda: open_corpus(config.data) and None, long=True)
        return ImageTask(config, accelerator.device)

    return train(config, make, resume, overwrite, quiet)


def check_estimator(settings: ImagesConfig) -> None:
    """Raises ConfigError for an estimator that does not exist."""
    name = getattr(settings.quantizer, "estimator", None)
    if name is not None:
        try:
            estimators.check(name, on_keys=False)
        except ValueError as error:
            raise ConfigError(f"images.quantizer.estimator = {name}: {error}") from None


def check_fits(config: ImageRunConfig, corpus: ImageCorpus) -> None:
    """Raises ConfigError when these pictures make no whole grid, or too few cells for the codebook's start."""
    images, shape = config.images, corpus.shape
    try:
        check_grid(images, shape.height, shape.width)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    lowest = [images.width * factor for factor in images.multipliers[-2:]]
    if (shape.height, shape.width) == (images.factor, images.factor) and any(norm(c).num_groups == c for c in lowest):
        raise ConfigError(
            f"images.multipliers = {images.multipliers} with patch = {images.patch}: {shape} pictures make one "
            "grid cell, and group norm leaves nothing of so few channels there; fewer halvings, or a width from 64 on"
        )
    if images.gan is not None and patches(images.gan.layers, min(shape.height, shape.width)) < 1:
        raise ConfigError(
            f"images.gan.layers = {images.gan.layers}: the discriminator sees nothing of {shape} pictures; fewer layers"
        )
    q = images.quantizer
    if isinstance(q, VQConfig) and (q.init != "normal" or q.start_step):
        pictures = min(len(corpus.splits["train"]), config.train.batch_size)
        cells = pictures * (shape.height // images.factor) * (shape.width // images.factor)
        if cells < q.codes:
            raise ConfigError(
                f"images.quantizer.codes = {q.codes}: they are made from one batch (init: {q.init}, start_step: "
                f"{q.start_step}), whose {pictures} pictures have {cells} grid cells; fewer codes or more pictures"
            )
