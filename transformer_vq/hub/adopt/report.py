"""The numbers of an adopted run as a page and a picture: adopt.md and plots/adopt.png.

Recovered is the share of what conversion cost that tuning brought back: (converted − tuned) / (converted − before).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from transformer_vq.evaluation.plots import GREY, save_figure, shown
from transformer_vq.files import read_text, write_text
from transformer_vq.hub.adopt.convert import NUMBERS

STAGES = {"before": "as it came", "converted": "converted", "tuned": "tuned"}
COLOURS = {"before": "#5a8f4e", "converted": "#c8553d", "tuned": "#4878a8"}
UNITS = {"bits_per_byte": "bits per byte", "bits_per_token": "bits per token"}


def finish(run: Path) -> dict[str, Any]:
    """Add what tuning gave, where there is any, and write page and picture; returns all numbers.

    Raises WriteError.
    """
    numbers: dict[str, Any] = json.loads(read_text(run / NUMBERS))
    summary = run / "summary.json"
    if summary.is_file():
        found = json.loads(read_text(summary))
        numbers["tuned"] = {key: value for key, value in found["test"].items() if "/" not in key}
        numbers |= {key: found[key] for key in ("steps", "tokens", "seconds")}
        numbers["recovered"] = recovered(numbers)
        write_text(run / NUMBERS, json.dumps(numbers, indent=1))
    write_text(run / "adopt.md", page(numbers, run.name))
    save_figure(picture(numbers), run / "plots" / "adopt.png")
    return numbers


def recovered(numbers: Mapping[str, Any]) -> float | None:
    """See the top; None where conversion cost nothing."""
    before, converted, tuned = (numbers[stage][numbers["unit"]] for stage in STAGES)
    cost = converted - before
    return (converted - tuned) / cost if cost > 0 else None


def page(numbers: Mapping[str, Any], run: str) -> str:
    """Markdown."""
    unit, stages = numbers["unit"], [stage for stage in STAGES if stage in numbers]
    first = numbers["before"]
    lines = [
        f"# {run}, adopted from {numbers['model']}",
        "",
        f"A {numbers['type']} whose attention keys are quantized. Scores are of the test split, "
        f"{first['tokens']:,} tokens, with a context of {numbers['context']}; layers of {numbers['measured_tokens']:,} "
        f"tokens of valid. Codebooks: k-means on the keys of {numbers['calibration_tokens']:,} tokens of train.",
        "",
        f"| | {UNITS[unit]} | − as it came | perplexity |",
        "|---|--:|--:|--:|",
    ]
    for stage in stages:
        score = numbers[stage]
        change = "" if stage == "before" else f"{score[unit] - first[unit]:+.4f}"
        lines.append(f"| {words(numbers, stage)} | {score[unit]:.4f} | {change} | {score['perplexity']:.4g} |")
    if numbers.get("recovered") is not None:
        lines += ["", f"Tuning brought back {numbers['recovered']:.0%} of what conversion cost."]
    lines += [
        "",
        f"| layer | converted | damage, {UNITS[unit]} | output error | key error |",
        "|--:|---|--:|--:|--:|",
    ]
    for layer in numbers["layers"]:
        key_error = f"{layer['key_error']:.3f}" if "key_error" in layer else ""
        lines.append(
            f"| {layer['layer']} | {'yes' if layer['converted'] else 'no, keeps every key'} | {layer['damage']:+.4f} "
            f"| {layer['output_error']:.3f} | {key_error} |"
        )
    lines += [
        "",
        "Damage: what this layer adds when it alone is converted. Output error: of what the layer adds to the residual "
        "stream, relative, on the original's own inputs. Key error: mean ‖k − c‖/‖k‖.",
        "",
        "![Scores by stage, damage and errors by layer](plots/adopt.png)",
        "",
    ]
    return "\n".join(lines)


def words(numbers: Mapping[str, Any], stage: str) -> str:
    """A stage, and for tuning how long and on what."""
    if stage != "tuned":
        return STAGES[stage]
    how = {"distill": "distilled from the original", "text": "on the text"}[numbers["objective"]]
    return f"tuned, {numbers['tokens']:,} tokens, {how}"


def picture(numbers: Mapping[str, Any]) -> Figure:
    """Scores by stage; damage and errors by layer."""
    figure = Figure(figsize=(11.2, 3.8), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    unit, layers = numbers["unit"], numbers["layers"]
    stages = [stage for stage in STAGES if stage in numbers]
    values = [numbers[stage][unit] for stage in stages]
    first.bar(range(len(stages)), values, color=[COLOURS[stage] for stage in stages], width=0.6)
    first.set_xticks(range(len(stages)), [STAGES[stage] for stage in stages])
    for i, value in enumerate(values):
        first.annotate(f"{value:.4f}", (i, value), ha="center", va="bottom", fontsize=8)
    span = max(values) - min(values) or 0.1
    first.set_ylim(max(0.0, min(values) - span), max(values) + 0.2 * span)
    style(first, UNITS[unit], "test split; the axis does not start at 0")
    index = [layer["layer"] for layer in layers]
    shades = [COLOURS["converted"] if layer["converted"] else "#cccccc" for layer in layers]
    second.bar(index, [layer["damage"] for layer in layers], color=shades, width=0.7)
    second.axhline(0, color=GREY, linewidth=0.8)
    style(second, f"added {UNITS[unit]}", "this layer alone converted (grey: not taken)")
    for key, label, colour in (("output_error", "output", "#4878a8"), ("key_error", "keys", "#8a6fb0")):
        points = [(layer["layer"], layer[key]) for layer in layers if key in layer]
        if points:
            third.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=label)
    third.set_ylim(bottom=0)
    third.legend(frameon=False, fontsize=9)
    style(third, "relative error", "on the original's own inputs")
    for axes in (second, third):
        axes.set_xlabel("layer", fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(shown(f"adopted from {numbers['model']}"), fontsize=10, color=GREY)
    return figure


def style(axes: Axes, label: str, title: str) -> None:
    """As the pictures of a run."""
    axes.set_ylabel(label, fontsize=9)
    axes.set_title(title, fontsize=9, color=GREY)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
