"""`transformer-vq doctor CONFIG`: does every layer's quantizer do what its config says, on real batches?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from transformer_vq.cli.arguments import Json, Overrides
from transformer_vq.cli.console import Failure, console, number, print_json, table
from transformer_vq.cli.runs import folder_of, one_line_for

if TYPE_CHECKING:
    from transformer_vq.bench.checks import Check
    from transformer_vq.bench.doctor import Batch, LayerReport
    from transformer_vq.config import RunConfig
    from transformer_vq.models import TransformerVQ

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
    json: Json = False,
) -> None:
    """Check every layer's quantizer on real batches; a run folder is examined with its trained weights."""
    from transformer_vq.config import ConfigError, RunConfig, load_config

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


def model_and_batches(run: str | None, settings: RunConfig, count: int) -> tuple[TransformerVQ, list[Batch], str]:
    """The model, trained where there is a run; its first training batches; words for both."""
    from transformer_vq.bench.doctor import Batch
    from transformer_vq.data import check_sources, mixed_batch, prepare_sources
    from transformer_vq.models import TransformerVQ
    from transformer_vq.training import CheckpointError, load_run
    from transformer_vq.training.language import with_vocabulary

    mixture = prepare_sources(settings.data)
    train = settings.train
    check_sources(mixture, train.seq_len, 1)
    if run is not None:
        with one_line_for(CheckpointError):
            loaded = load_run(run)
        model, weights = loaded.model, f"the weights of step {loaded.step}"
        model.set_step(loaded.step)
    else:
        model = TransformerVQ(with_vocabulary(settings.model, mixture.tokenizer), seed=settings.seed)
        weights = "untrained weights"
    reset = settings.data.document_boundaries == "reset"
    rows = range(train.micro_batch or train.batch_size)
    files = mixture.files("train")
    raw = [
        mixed_batch(files, mixture.shares, settings.seed, step, rows, train.batch_size, train.seq_len, reset=reset)
        for step in range(count)
    ]
    batches = [Batch(b.tokens, b.labels, b.segments) for b in raw]
    return model, batches, f"{weights}, {count} batches of {len(rows)} x {train.seq_len} tokens of {mixture.name}"


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
