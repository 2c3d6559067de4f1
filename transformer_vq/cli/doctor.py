"""`transformer-vq doctor CONFIG`: does every layer's quantizer do what its config says, on real batches?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from transformer_vq.cli.arguments import Json, Overrides
from transformer_vq.cli.batches import model_and_batches
from transformer_vq.cli.console import Failure, console, number, print_json, table
from transformer_vq.cli.runs import folder_of

if TYPE_CHECKING:
    from transformer_vq.bench.checks import Check
    from transformer_vq.bench.doctor import LayerReport

STYLES = {"green": "green", "amber": "yellow", "red": "bold red", "none": "dim"}
MARKS = {"green": "✓", "amber": "!", "red": "✗", "none": "·"}


def doctor(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG", help="A YAML file, a recipe's name such as lm/tiny, or RUN\\[@best|@last|@STEP]."
        ),
    ],
    overrides: Overrides = None,
    batches: Annotated[int, typer.Option(min=1, help="How many batches to look at.")] = 4,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when a line is red.")] = False,
    gradient: Annotated[
        bool,
        typer.Option(
            "--gradient", help="In place of the checks: every estimator's gradient against that of the smoothed loss."
        ),
    ] = False,
    estimator: Annotated[
        list[str] | None, typer.Option(help="--gradient: which to compare; again for more; all by default.")
    ] = None,
    sigma: Annotated[
        list[float] | None,
        typer.Option(help="--gradient: noise on keys, in units of rms |k - q|; again for more; 0.25, 0.5, 1."),
    ] = None,
    keys: Annotated[int | None, typer.Option(help="--gradient: keys of each layer, a row each; 64.")] = None,
    draws: Annotated[int | None, typer.Option(help="--gradient: draws of noise, each with both signs; 4096.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="--gradient: of the softmax family; the layer's own by default.")
    ] = None,
    through: Annotated[
        str | None,
        typer.Option(
            metavar="everything|window",
            help="--gradient: count what a key does through the cache, or, as backpropagation, in the window alone.",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="--gradient: draw it, .png, .svg or .pdf.")] = None,
    json: Json = False,
) -> None:
    """Check every layer's quantizer on real batches; a run folder is examined with its trained weights."""
    from transformer_vq.config import ConfigError, RunConfig, load_config

    numbers = {"keys": keys, "draws": draws, "temperature": temperature, "through": through}
    if gradient:
        from transformer_vq.cli.gradient import gradient as compare

        chosen = {"estimators": estimator, "sigmas": sigma, **numbers}
        compare(config, overrides or [], {k: v for k, v in chosen.items() if v is not None}, plot, json)
        return
    for name, value in {"estimator": estimator, "sigma": sigma, **numbers, "plot": plot}.items():
        if value is not None and value != []:
            raise ConfigError(f"--{name}: belongs to --gradient; add it")
    trained = (folder_of(config) / "checkpoints").is_dir()
    settings = load_config(folder_of(config) if trained else config, overrides or [], RunConfig)

    from transformer_vq.bench.doctor import diagnose
    from transformer_vq.models.names import check_names

    check_names(settings.model)
    if trained and any(text.startswith("model.") for text in overrides or []):
        raise ConfigError(f"{config}: a trained model is examined as it is; only settings of data and train can change")
    model, inputs, described = model_and_batches(config if trained else None, settings, batches)
    reports = diagnose(model, inputs)
    reds = sum(check.status == "red" for report in reports for check in report.checks)
    if json:
        print_json({"layers": [report.as_dict() for report in reports], "red": reds, "looked_at": described})
    else:
        show(reports, described)
    if strict and reds:
        raise Failure(f"doctor: {reds} red")


def show(reports: Sequence[LayerReport], described: str) -> None:
    """A coloured table, layers down and checks across, then one line of advice for each that is not green."""
    out = console()
    names = next(([c.name for c in r.checks] for r in reports if r.checks), [])
    grid = table("layer", "quantizer", *names)
    for report in reports:
        found = {check.name: check for check in report.checks}
        cells = [_cell(found.get(name)) for name in names]
        grid.add_row(str(report.layer), " ".join(filter(None, [report.kind, report.estimator])), *cells)
    out.print(f"looked at {described}", soft_wrap=True)
    out.print()
    out.print(grid)
    out.print()
    for report in reports:
        for check in report.checks:
            if check.status in ("amber", "red"):
                style = STYLES[check.status]
                out.print(Text(f"{check.status:<6}", style), f"layer {report.layer}  {check.name}: {check.advice}")
        if not report.checks:
            why = f"layer {report.layer}  full attention on unquantized keys: nothing to check"
            out.print(Text("none  ", "dim"), why)
    statuses = [check.status for report in reports for check in report.checks]
    out.print(", ".join(f"{statuses.count(name)} {name}" for name in ("green", "amber", "red")))


def _cell(check: Check | None) -> Text:
    if check is None:
        return Text("-", "dim")
    value = "" if check.value is None else f" {number(check.value, 3)}"
    return Text(f"{MARKS[check.status]}{value}", STYLES[check.status])
