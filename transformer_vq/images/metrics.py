"""Numbers about reconstructions and codes over a whole split; pixels in [0, 1].

    mse, l1              means over everything
    psnr, ssim           of each picture, then their mean  [torchmetrics; SSIM with its 11-pixel Gaussian window, which
                         is reflected at the edges: no ssim of pictures with a side below 6]
    quantization_error   mean over grid cells of ‖k − q‖², summed over the code's width
    usage, perplexity, dead_codes, norm_ratio, ...    codebook health over the split (evaluation/health.py): by stage,
                         as `layer0/usage`, and as means over stages
    usage_batch          mean over batches of the share of codes in one, as the rotation paper counts it

Axes:   B batch  C channels  h, w height and width  H product parts  S codes
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transformer_vq.evaluation.health import LayerHealth
from transformer_vq.evaluation.mode import evaluating
from transformer_vq.images.batches import to_bytes, to_unit
from transformer_vq.images.distances import ALONE, Distance
from transformer_vq.images.model import ImageModel
from transformer_vq.images.pictures import Pictures
from transformer_vq.images.quantize import Latents

SSIM_SIDE = 6  # the window reaches 5 pixels beyond an edge, and what is reflected there must exist


class CodeMeter:
    """Follows the codes of every stage over a split."""

    def __init__(self) -> None:
        self.stages: list[LayerHealth] = []
        self.errors, self.cells = 0.0, 0
        self.usages: list[tuple[int, float]] = []

    def update(self, model: ImageModel, latents: Latents) -> None:
        """One batch."""
        difference = (latents.keys - latents.quantized).double()
        self.errors += difference.square().sum().item()
        self.cells += difference.numel() // difference.shape[1]
        if not latents.codes.numel():
            return
        if not self.stages:
            self.stages = [LayerHealth(q.codebook.detach()) for q in model.quantizer.quantizers]
        used = []
        for health, stage in zip(self.stages, latents.stages, strict=True):
            codes = stage.result.codes[0]  # (H, N)
            health.add(stage.k, stage.result, torch.ones(1, codes.shape[1], dtype=torch.bool, device=codes.device))
            used += [part.unique().numel() / health.counts.shape[1] for part in codes]
        self.usages.append((len(latents.codes), fmean(used)))

    def histograms(self) -> list[Tensor]:
        """By stage, how often each code was taken: (H, S)."""
        return [stage.counts for stage in self.stages]

    def compute(self) -> dict[str, float]:
        """Without a codebook only the quantization error, which is 0 then."""
        out = {"quantization_error": self.errors / max(self.cells, 1)}
        if not self.stages:
            return out
        largest = max(size for size, _ in self.usages)  # a rest at the end would count as a batch of few codes
        out["usage_batch"] = fmean(usage for size, usage in self.usages if size == largest)
        means = defaultdict(list)
        for i, stage in enumerate(self.stages):
            for name, value in stage.summary().items():
                out[f"layer{i}/{name}"] = value
                means[name].append(value)
        return out | {name: fmean(values) for name, values in means.items()}


def evaluate_split(
    model: ImageModel,
    pictures: Pictures,
    batch_size: int,
    limit: int | None = None,
    also: Sequence[Distance] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Any], CodeMeter]:
    """See the file's text; what `also` measures is added.  limit: only the first so many pictures.

    progress(done, total) is called after every batch.
    """
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

    codes = CodeMeter()
    squares = absolutes = 0.0
    values, count = 0, min(len(pictures), limit or len(pictures))
    with evaluating(model) as device:
        psnr = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3), **ALONE).to(device)
        ssim: StructuralSimilarityIndexMeasure | None = None
        for start in range(0, count, batch_size):
            raw = torch.from_numpy(pictures.read(np.arange(start, min(start + batch_size, count)))).to(device)
            out = model(to_unit(raw).to(model.last_layer.dtype))
            real, fake = raw / 255, (out.pictures.float().clamp(-1, 1) + 1) / 2
            squares += (real - fake).square().sum(dtype=torch.float64).item()
            absolutes += (real - fake).abs().sum(dtype=torch.float64).item()
            values += real.numel()
            psnr.update(fake, real)
            if min(raw.shape[2:]) >= SSIM_SIDE:
                ssim = ssim or StructuralSimilarityIndexMeasure(data_range=1.0, **ALONE).to(device)
                ssim.update(fake, real)
            codes.update(model, out.latents)
            for distance in also:
                distance.update(raw, to_bytes(out.pictures))
            progress(start + len(raw), count)
    numbers: dict[str, Any] = {
        "mse": squares / values,
        "l1": absolutes / values,
        "psnr": float(psnr.compute()),
        **({} if ssim is None else {"ssim": float(ssim.compute())}),  # type: ignore[arg-type]
        **codes.compute(),
        "images": count,
    }
    for distance in also:
        numbers |= distance.compute()
    return numbers, codes


@torch.inference_mode()
def reconstruct(model: ImageModel, raw: Tensor) -> Tensor:
    """uint8 (B, C, h, w) -> what the model makes of it, uint8."""
    with evaluating(model) as device:
        return to_bytes(model(to_unit(raw.to(device)).to(model.last_layer.dtype)).pictures).cpu()
