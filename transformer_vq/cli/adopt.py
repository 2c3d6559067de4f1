"""`transformer-vq adopt MODEL RUN`: a pretrained softmax decoder becomes a VQ model in a run folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from transformer_vq.cli.arguments import Json, Overrides
from transformer_vq.cli.console import console, number, print_json, print_lines, table
from transformer_vq.cli.runs import one_line_for

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A name on the hub or a folder: Llama, Mistral, Qwen2.")]
Target = Annotated[Path, typer.Argument(metavar="RUN", help="A new run folder.")]
Tokens = Annotated[int, typer.Option(min=0, help="Tokens to tune on; 0: convert and measure alone.")]
Layers = Annotated[
    str, typer.Option(metavar="all|0,2-3|best:N", help="Layers to convert; the others keep every key. best: by damage.")
]
Objective = Annotated[
    Literal["distill", "text"], typer.Option(help="Tune on the original's predictions, or on the text.")
]
Calibrate = Annotated[int, typer.Option(min=1, help="Tokens of train whose keys make the codebooks.")]
Measure = Annotated[int, typer.Option(min=2, help="Tokens of valid that damage and errors are measured on.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with tuning that was interrupted.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no numbers at the end.")]


def adopt(
    model: Model,
    run: Target,
    overrides: Overrides = None,
    tokens: Tokens = 1_000_000,
    layers: Layers = "all",
    objective: Objective = "distill",
    calibrate: Calibrate = 65_536,
    measure: Measure = 32_768,
    resume: Resume = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a pretrained softmax decoder into a VQ model, tune it, and say what each step cost.

    Weights are kept; keys inside the window stay exact, older ones act through codebooks made by k-means from the
    model's own keys, rotated as at the window's end. Scores stand side by side: as it came, converted, tuned.
    """
    from transformer_vq.config import ConfigError, RunConfig, load_config
    from transformer_vq.config.extras import need

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("adopt: converts in one process; several tune: transformer-vq train RUN --resume")
    if not resume and run.exists():
        raise ConfigError(f"{run}: is there already; name another, or --resume to go on with it")
    need("transformers", "adopt")
    from transformer_vq.hub.adopt import convert, report
    from transformer_vq.training import CheckpointError, TrainingDiverged, TrainingInterrupted
    from transformer_vq.training import run as tune

    out = console(quiet=quiet, to_stderr=json)
    if resume:
        if not (run / convert.NUMBERS).is_file():
            raise ConfigError(f"{run}: is no adopted run, it holds no {convert.NUMBERS}")
        config = load_config(run, overrides or [], RunConfig).model_copy(update={"run_dir": str(run)})
    else:
        wishes = convert.Wishes(tokens, layers, objective, calibrate, measure)
        config = convert.adopt(model, run, overrides or [], wishes, lambda text: out.print(text, soft_wrap=True))
    if tokens:
        with one_line_for(TrainingDiverged, TrainingInterrupted, CheckpointError):
            tune(config, resume=True, quiet=quiet or json)
    numbers = report.finish(run)
    if json:
        print_json({"run": str(run), **numbers})
        return
    show(out, numbers, run)


def show(out: Any, numbers: dict[str, Any], run: Path) -> None:
    """Scores by stage, layers, and where it all is."""
    from transformer_vq.hub.adopt.report import STAGES, UNITS, words

    unit = numbers["unit"]
    scores = table("", UNITS[unit], "- as it came", "perplexity")
    for stage in (stage for stage in STAGES if stage in numbers):
        change = numbers[stage][unit] - numbers["before"][unit]
        cells = (numbers[stage][unit], None if stage == "before" else change, numbers[stage]["perplexity"])
        scores.add_row(words(numbers, stage), *map(number, cells))
    out.print(scores)
    out.print()
    layers = table("layer", "converted", "damage", "output error", "key error")
    for layer in numbers["layers"]:
        found = (number(layer.get(key)) for key in ("damage", "output_error", "key_error"))
        layers.add_row(str(layer["layer"]), "yes" if layer["converted"] else "no", *found)
    out.print(layers)
    print_lines(
        out,
        {
            "report": f"{run}/adopt.md, adopt.json; pictures in {run}/plots",
            "next": f"transformer-vq generate {run} --prompt 'Some text'",
        },
    )
