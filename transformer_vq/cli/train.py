"""`transformer-vq train CONFIG`: train, evaluate and leave a run folder. Also what launchers start in every process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from transformer_vq.cli.arguments import Config, Json, Overrides
from transformer_vq.cli.console import console, number, print_json, print_lines, table
from transformer_vq.cli.describe import facts, layers_table, summary, vocabulary
from transformer_vq.cli.runs import one_line_for, told_to_all
from transformer_vq.cli.threads import settle_threads

if TYPE_CHECKING:
    from transformer_vq.config import RunConfig

Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in run_dir from its last checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the run in run_dir and start anew.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the config, say what would happen, and stop.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No first screen, no progress, no numbers at the end.")]


def train(
    config: Config,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a language model and leave a run folder: metrics, checkpoints, plots."""
    from transformer_vq.config import RunConfig, load_config

    with told_to_all(joins=not dry_run):
        settings = in_place(load_config(config, overrides or [], RunConfig), config, overrides or [])
    if dry_run:
        show_plan(settings, resume, overwrite, json)
        return

    settle_threads(quiet)
    from transformer_vq.training import CheckpointError, TrainingDiverged, TrainingInterrupted, run

    with one_line_for(TrainingDiverged, TrainingInterrupted, CheckpointError):
        result = run(settings, resume=resume, overwrite=overwrite, quiet=quiet)
    if json:
        print_json(result)
        return
    out = console(quiet=quiet)
    unit = "byte" if "bits_per_byte" in result["test"] else "token"  # of tokens that came without their text
    scores = table("", f"bits per {unit}", "perplexity", "tokens")
    for split in ("valid", "test"):
        score = result[split]
        scores.add_row(split, *(number(score[key]) for key in (f"bits_per_{unit}", "perplexity", "tokens")))
    out.print(scores)
    print_lines(
        out,
        {
            "numbers": f"{settings.run_dir}/summary.json, metrics.jsonl; pictures in {settings.run_dir}/plots",
            "next": f"transformer-vq generate {settings.run_dir} --prompt 'Some text'",
        },
    )


def in_place(settings: RunConfig, source: str, overrides: list[str]) -> RunConfig:
    """A run folder given as CONFIG is where that run goes on, wherever it has been moved to."""
    if Path(source).is_dir() and not any(override.startswith("run_dir=") for override in overrides):
        return settings.model_copy(update={"run_dir": source})
    return settings


def show_plan(settings: RunConfig, resume: bool, overwrite: bool, json: bool) -> None:
    """What a run would do. No data is read and nothing is written.  Raises ConfigError as the run would."""
    from transformer_vq.training.context import check_context
    from transformer_vq.training.loop import check_settings
    from transformer_vq.training.run_folder import RunFolder
    from transformer_vq.training.sharding import check_scalars

    check_settings(settings)
    check_context(settings, settings.train.context_parallel)  # a plan may be made where fewer processes are
    check_scalars(settings.model, settings.train.shard, processes=2)
    finished = RunFolder(settings.run_dir).check(settings.written(), resume, overwrite)
    last = None if overwrite else RunFolder(settings.run_dir).checkpoints.last()
    found = facts(settings)
    short = short_of_memory(settings)
    tokens = settings.train.steps * settings.train.batch_size * settings.train.seq_len
    if json:
        plan: dict[str, Any] = {"config": settings.model_dump(mode="json"), "describe": found, "tokens": tokens}
        print_json({**plan, "finished": finished is not None, "from_step": last or 0, "short_of_memory": short})
        return
    out = console()
    out.print(layers_table(found["layers"]))
    out.print()
    train_ = settings.train
    mix = settings.data.mix
    sources = settings.data.source if mix is None else " + ".join(f"{s.source} ({s.weight:g})" for s in mix.values())
    lines = {
        "data": f"{sources}, tokenizer {settings.data.tokenizer}, order {settings.data.order}",
        **summary(found),
        "training": f"{train_.steps:,} steps of {train_.batch_size} × {train_.seq_len} tokens, {tokens:,} in all; "
        f"{train_.optimizer}, {train_.precision}",
        "writes to": settings.run_dir,
    }
    if finished is not None:
        lines["but"] = "that folder holds a finished run of this config: nothing would be done"
    elif last:
        lines["goes on"] = f"after step {last}"
    if short:
        lines["warning"] = short
    print_lines(out, lines)
    out.print("dry run: nothing was read, trained or written")


def short_of_memory(settings: RunConfig) -> str | None:
    """One line when this machine, or its GPU, has less memory than a step takes."""
    import torch

    from transformer_vq.training.distributed import asked_for
    from transformer_vq.training.memory import complaint

    size = settings.model.vocab_size or vocabulary(settings.data.tokenizer)
    model = settings.model.model_copy(update={"vocab_size": size})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return complaint(settings.model_copy(update={"model": model}), device, asked_for())
