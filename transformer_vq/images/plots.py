"""Pictures of an image run: reconstructions, how often each code is used, and curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from transformer_vq.evaluation.plots import GREY, PICTURES, Panel, draw, read_metrics, save_figure
from transformer_vq.images.pictures import Array

CURVES = {
    "quality": [
        Panel("loss", "training loss"),
        Panel("mse", "mean squared error, pixels in [0, 1]"),
        Panel("psnr", "PSNR, dB"),
    ],
    "codebooks": PICTURES["codebooks"],
    "keys": PICTURES["keys"],
    "cost": [Panel("images_per_s", "images a second", limits=(0, None)), *PICTURES["cost"][1:]],
}
GAP = 2  # pixels between pictures


def write_curves(run_dir: Path) -> list[Path]:
    """Curves from `metrics.jsonl` into `plots/`; returns the files written."""
    records = read_metrics(run_dir / "metrics.jsonl")
    figures = ((name, draw(records, panels, title=run_dir.resolve().name)) for name, panels in CURVES.items())
    return [save_figure(figure, run_dir / "plots" / f"{name}.png") for name, figure in figures if figure is not None]


def write_reconstructions(real: Array, fake: Array, path: Path) -> Path:
    """Three rows: input, reconstruction, absolute error twice as bright (white is half the range)."""
    error = np.abs(real.astype(np.int16) - fake).clip(0, 127).astype(np.uint8) * 2
    tiled = np.concatenate([_row(pictures) for pictures in (real, fake, error)], axis=1)
    height = real.shape[2] + GAP
    high = max(3.2 * height / (real.shape[3] + GAP), 1.2)  # of flat pictures, the labels still need room
    figure = Figure(figsize=(1.0 * len(real) + 1.2, high), layout="constrained")
    axes = figure.subplots()
    if tiled.shape[0] == 1:
        axes.imshow(tiled[0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    else:
        axes.imshow(tiled.transpose(1, 2, 0), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([(row + 0.5) * height for row in range(3)], ["input", "reconstruction", "error × 2"], fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return save_figure(figure, path)


def _row(pictures: Array) -> Array:
    """(n, C, h, w) side by side on white: (C, h + gap, n (w + gap))."""
    framed = np.pad(pictures, ((0, 0), (0, 0), (0, GAP), (0, GAP)), constant_values=255)
    return np.concatenate(list(framed), axis=2)


def write_usage(histograms: Sequence[Tensor], path: Path) -> Path:
    """How often each code was taken over the test split, most frequent first; one line per codebook."""
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for stage, histogram in enumerate(histograms):
        for part, counts in enumerate(histogram.double().numpy()):
            share = np.sort(counts)[::-1] / max(counts.sum(), 1)
            used = int((counts > 0).sum())
            name = f"stage {stage}" + (f", part {part}" if len(histogram) > 1 else "")
            label = f"{name}: {used} of {len(counts)} used"
            axes.step(np.arange(1, used + 1), share[:used], where="mid", linewidth=1.3, label=label)
    sizes = [histogram.shape[1] for histogram in histograms]
    axes.axhline(1 / max(sizes), color=GREY, linestyle=":", linewidth=1)
    axes.annotate("even use", (max(sizes), 1 / max(sizes)), fontsize=8, color=GREY, ha="right", va="bottom")
    axes.set_xlim(0, max(sizes) + 1)
    axes.set_yscale("log")
    axes.set_xlabel("code, most frequent first", fontsize=9)
    axes.set_ylabel("share of the test split's grid cells", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)
