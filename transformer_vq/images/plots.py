"""Pictures of an image run: reconstructions, how often each code is used, and curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from transformer_vq.evaluation.plots import GREY, PICTURES, Panel, draw, read_metrics
from transformer_vq.images.pictures import Array

CURVES = {
    "quality": [
        Panel("loss", "training loss"),
        Panel("mse", "mean squared error, pixels in [0, 1]", log=True),
        Panel("psnr", "PSNR, dB"),
    ],
    "codebooks": PICTURES["codebooks"],
    "keys": PICTURES["keys"],
}


def write_curves(run_dir: Path) -> list[Path]:
    """Curves from `metrics.jsonl` into `plots/`; returns the files written."""
    records = read_metrics(run_dir / "metrics.jsonl")
    figures = ((name, draw(records, panels, title=run_dir.resolve().name)) for name, panels in CURVES.items())
    return [_save(figure, run_dir / "plots" / f"{name}.png") for name, figure in figures if figure is not None]


def write_reconstructions(real: Array, fake: Array, path: Path) -> Path:
    """A grid of three rows: input, reconstruction, absolute error (brighter is larger; white is half the range)."""
    error = np.abs(real.astype(np.int16) - fake).clip(0, 127).astype(np.uint8) * 2
    figure = Figure(figsize=(1.0 * len(real) + 0.9, 3.3), layout="constrained")
    rows = figure.subplots(3, len(real), squeeze=False)
    for axes, name, pictures in zip(rows, ("input", "reconstruction", "error × 2"), (real, fake, error), strict=True):
        for ax, picture in zip(axes, pictures, strict=True):
            _show(ax, picture)
        axes[0].set_ylabel(name, fontsize=9)
    return _save(figure, path)


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
    return _save(figure, path)


def _show(axes: Axes, picture: Array) -> None:
    """(C, h, w)."""
    if picture.shape[0] == 1:
        axes.imshow(picture[0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    else:
        axes.imshow(picture.transpose(1, 2, 0), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
