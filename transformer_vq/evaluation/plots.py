"""Pictures of a run from its `metrics.jsonl`: what it learned, how its codebooks fared and what it cost. No
torch in here.

A picture is one line in `PICTURES`. Panels whose numbers the run does not have are left out, and so are empty pictures.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogFormatter, MaxNLocator

from transformer_vq.files import write, writing

Records = list[dict[str, Any]]


class Panel(NamedTuple):
    """One set of axes: a metric of the whole model, or one line a layer."""

    metric: str
    label: str
    per_layer: bool = False
    log: bool = False
    level: float | None = None
    """A value worth a dotted line, such as the ratio 1."""
    limits: tuple[float, float | None] | None = None
    """Of the vertical axis, for what has a natural scale; else it fits the numbers."""
    unit: float = 1.0
    """What the numbers are divided by."""
    shares: bool = False
    """Stacked: which of PARTS the time went into, `metric` being all of it."""


PICTURES = {
    "loss": [Panel("loss", "loss, nats per token"), Panel("bits_per_byte", "bits per byte")],
    "codebooks": [
        Panel("usage", "share of the codes in use", per_layer=True, limits=(0, 1.03)),
        Panel("perplexity", "perplexity of the codes", per_layer=True, log=True),
    ],
    "cost": [
        Panel("tokens_per_s", "tokens a second", limits=(0, None)),
        Panel("cost/mfu", "share of the devices' peak (MFU)", limits=(0, None)),
        Panel("cost/peak_bytes", "peak memory, GiB", limits=(0, None), unit=2**30),
        Panel("cost/seconds", "share of the time", shares=True, limits=(0, 1)),
    ],
    "keys": [
        Panel("norm_ratio", "norm ratio ‖q‖ / ‖k‖", per_layer=True, level=1.0),
        Panel("relative_error", "relative error ‖k − q‖ / ‖k‖", per_layer=True),
        Panel("cosine", "cosine of k and q", per_layer=True),
    ],
}
PARTS = {  # of a training record's time, from the bottom, where it is written; what is left is training
    "cost/data": ("waiting for data", "#c8553d"),
    "cost/communication": ("waiting for processes", "#e0a458"),
    "cost/checkpoint": ("checkpoints", "#8a6bb1"),
    "cost/evaluation": ("evaluation", "#5a8f4e"),
}
BINS = 60  # as many steps at most, one beside the other
SPLIT_COLOURS = {"train": "#4878a8", "valid": "#c8553d", "test": "#5a8f4e"}
LEGEND_LAYERS = 8  # more layers than this get a colour bar in place of a legend
SMOOTH_FROM = 300  # more training records than this are shown as a running mean over the faint raw line
GREY = "#555555"


def write_plots(run_dir: Path) -> list[Path]:
    """Draw every picture that `run_dir/metrics.jsonl` has numbers for into `run_dir/plots/`; returns the files written.

    Raises FileNotFoundError where there is no such file, WriteError.
    """
    records = read_metrics(run_dir / "metrics.jsonl")
    folder = run_dir / "plots"
    with writing(folder):
        folder.mkdir(exist_ok=True)
    written = []
    for name, panels in PICTURES.items():
        figure = draw(records, panels, title=run_dir.resolve().name)
        if figure is not None:
            written.append(save_figure(figure, folder / f"{name}.png"))
    return written


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a picture, in one piece.  Raises WriteError."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with unknown_letters():
        write(path, lambda place: figure.savefig(place, dpi=150))
    return path


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element to stand inside a page; the same bytes for the same figure."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "transformer-vq"}), unknown_letters():
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


@contextmanager
def unknown_letters() -> Iterator[None]:
    """A letter that the font lacks is drawn as a box, and that is said by the box."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def shown(name: str, longest: int = 60) -> str:
    """A name as the text of a picture: one line, not too long, no formula between dollars, no control characters.

    A leading underscore, which hides a line from the legend, comes after a space.
    """
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(name.split()))
    text = text if len(text) <= longest else f"{text[: longest - 1].rstrip()}…"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def read_metrics(path: Path) -> Records:
    """The records of a run; a last line that a kill cut short is left out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for i, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if i + 1 < len(lines):
                raise
    return records


def draw(records: Records, panels: Iterable[Panel], title: str, shades: str = "viridis") -> Figure | None:
    """The panels that have numbers, side by side; None when none has. shades: matplotlib's name for layers' colours."""
    filled = [(panel, lines) for panel in panels if (lines := _lines(records, panel))]
    if not filled:
        return None
    figure = Figure(figsize=(5.6 * len(filled), 4.2), layout="constrained")
    for axes, (panel, lines) in zip(figure.subplots(1, len(filled), squeeze=False)[0], filled, strict=True):
        if panel.shares:
            _shares(axes, records)
        elif panel.per_layer:
            _layers(axes, lines, records, panel, colormaps[shades])
        else:
            _splits(axes, lines)
        _finish(axes, panel, "tokens" if any("tokens" in record for record in records) else "step")
    figure.suptitle(shown(title), fontsize=10, color=GREY)
    return figure


def _lines(records: Records, panel: Panel) -> dict[Any, tuple[np.ndarray, np.ndarray]]:
    """Line's name, a split or a layer -> (x, y). A step that was written again after a resume counts once."""
    points: dict[Any, dict[int, tuple[float, float]]] = defaultdict(dict)
    chosen = _split_of_layers(records, panel.metric) if panel.per_layer else None
    for record in records:
        split = record.get("split", "train")
        if chosen is not None and split != chosen:
            continue
        x = _place(record)
        for key, value in record.items():
            name = _layer(key, panel.metric) if panel.per_layer else split if key == panel.metric else None
            if name is not None and value is not None:
                points[name][record["step"]] = (x, float(value) / panel.unit)
    ordered = sorted(points) if panel.per_layer else points
    return {name: _columns(points[name]) for name in ordered}


def _place(record: Mapping[str, Any]) -> float:
    return float(record["tokens"] if "tokens" in record else record["step"])


def _shares(axes: Axes, records: Records) -> None:
    """Neighbouring records are put together, so that there are no more than BINS."""
    timed = list({r["step"]: r for r in records if "cost/seconds" in r}.values())
    cuts = np.linspace(0, len(timed), min(BINS, len(timed)) + 1).astype(int)
    bins = [timed[a:b] for a, b in pairwise(cuts)]
    total = [sum(r["cost/seconds"] for r in part) for part in bins]
    ends = [0.0, *(_place(part[-1]) for part in bins)]
    below = np.zeros(len(bins))
    for name, (label, colour) in PARTS.items():
        share = np.array([sum(r.get(name, 0.0) for r in part) for part in bins]) / total
        if share.any():
            whole = sum(r.get(name, 0.0) for r in timed) / sum(total)
            axes.stairs(below + share, ends, baseline=below, fill=True, color=colour, label=f"{label}  {whole:.1%}")
            below = below + share
    axes.stairs(np.ones(len(bins)), ends, baseline=below, fill=True, color="#dce4ec", label="training")
    axes.legend(fontsize=8, loc="upper right")


def _columns(points: dict[int, tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.array([points[step] for step in sorted(points)]).T
    return x, y


def _layer(key: str, metric: str) -> int | None:
    """12 for `layer12/usage` when the metric is `usage`."""
    match = re.fullmatch(r"layer(\d+)/(.+)", key)
    return int(match[1]) if match and match[2] == metric else None


def _split_of_layers(records: Records, metric: str) -> str | None:
    """Whole-split numbers where there are at least two of them, else the training batches'."""
    having = [record.get("split", "train") for record in records if any(_layer(k, metric) is not None for k in record)]
    return "valid" if having.count("valid") >= 2 or "train" not in having else "train"


def _splits(axes: Axes, lines: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    for split, (x, y) in lines.items():
        colour = SPLIT_COLOURS.get(split, GREY)
        if split == "train" and len(y) > SMOOTH_FROM:
            axes.plot(x, y, color=colour, linewidth=0.5, alpha=0.3)
            width = len(y) // 100
            x, y = x[width - 1 :], np.convolve(y, np.full(width, 1 / width), mode="valid")  # noqa: PLW2901
        marker = "" if split == "train" and len(y) > 1 else "o"
        axes.plot(x, y, color=colour, label=f"{split}  {y[-1]:.4g}", linewidth=1.5, marker=marker, markersize=3.5)
    finite = np.concatenate([y for _, y in lines.values()])
    finite = finite[np.isfinite(finite)]
    if len(finite) > 20:  # the first steps from a random model would squeeze everything that follows
        low, high = finite.min(), np.quantile(finite, 0.98)
        if high > low:
            axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.legend(frameon=False, fontsize=9)


def _layers(
    axes: Axes, lines: dict[int, tuple[np.ndarray, np.ndarray]], records: Records, panel: Panel, colours: Colormap
) -> None:
    few = len(lines) <= LEGEND_LAYERS
    dots: dict[str, Any] = {"marker": "o", "markersize": 2.5} if few else {}
    last = max(lines)
    for layer, (x, y) in lines.items():
        shade = colours(0.92 * layer / max(last, 1))
        axes.plot(x, y, color=shade, linewidth=1.4 if few else 0.8, label=f"layer {layer}", **dots)
    if panel.level is not None:
        axes.axhline(panel.level, color=GREY, linestyle=":", linewidth=1)
    if few:
        axes.legend(frameon=False, fontsize=8, ncols=2 if len(lines) > 4 else 1)
    else:
        norm = BoundaryNorm(np.arange(last + 2) - 0.5, colours.N)
        bar = axes.figure.colorbar(ScalarMappable(norm, colours), ax=axes, pad=0.02, aspect=30)
        bar.set_label("layer", fontsize=9)
        bar.ax.yaxis.set_major_locator(MaxNLocator(9, integer=True))
        bar.ax.minorticks_off()
        bar.ax.tick_params(labelsize=8)
    split = _split_of_layers(records, panel.metric)
    axes.set_title("training batches" if split == "train" else f"whole {split} split", fontsize=9, color=GREY)
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.7)))
        axes.tick_params(which="minor", labelsize=8)


def _finish(axes: Axes, panel: Panel, x: str) -> None:
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(panel.label, fontsize=9)
    if panel.limits is not None:
        low, high = panel.limits
        axes.set_ylim(low, 1.08 * axes.get_ylim()[1] if high is None else high)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.tick_params(labelsize=8)
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
