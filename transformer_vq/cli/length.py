"""`transformer-vq length RUN …`: bits per byte by position, in texts much longer than those in training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transformer_vq.cli.arguments import Json, check_plot
from transformer_vq.cli.console import console, print_json, progress_bar, table
from transformer_vq.cli.evaluate import Split, read_sources, settings_for
from transformer_vq.cli.runs import launched, open_run

if TYPE_CHECKING:
    from rich.table import Table

    from transformer_vq.data import TokenFile
    from transformer_vq.evaluation.length import Bin, Recurrences

Runs = Annotated[
    list[str],
    typer.Argument(metavar="RUN[@best|@last|@STEP]...", help="Run folders, and which of their checkpoints."),
]
Recurrence = Annotated[
    int | None,
    typer.Option(
        min=2,
        max=8,
        metavar="N",
        help="Also by how many windows ago the N tokens before last occurred in the same text.",
    ),
]
Data = Annotated[str | None, typer.Option("--data", help="Another text than the runs' own, as data.source names it.")]
Times = Annotated[int, typer.Option(min=1, help="Length of a text, as a multiple of the length in training.")]
Texts = Annotated[int | None, typer.Option("--texts", min=1, help="Read only the first of them.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw it; nothing is written without.")]


def length(
    runs: Runs,
    split: Split = "test",
    times: Times = 16,
    texts: Texts = None,
    data: Data = None,
    recurrence: Recurrence = None,
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Bits per byte by position, the state carried, in texts of 16 times the length in training.

    Under torchrun or accelerate launch the processes share the work.
    """
    check_plot(plot)
    results, recurring, trained_on, window = {}, {}, {}, {}
    with launched(runs[0]) as accelerator:
        for run in dict.fromkeys(runs):
            loaded = open_run(run, accelerator.device)
            settings = settings_for(loaded, run, [f"data.source={data}"] if data else [])

            from transformer_vq.evaluation.length import score_texts
            from transformer_vq.training.distributed import crew

            team, size = crew(accelerator, in_step=False), settings.eval.batch_size
            for name, tokens in read_sources(settings, loaded, run, accelerator).files(split).items():
                reach = times * settings.train.seq_len
                check_text(tokens, run, name, split, times, settings.train.seq_len)
                text = f"{run} on {name}" if name else run
                trained_on[text] = settings.train.seq_len
                with progress_bar(f"{text}, {split}") as progress:
                    scores = score_texts(loaded.model, tokens, reach, size, texts, progress, team)
                results[text] = scores.by_position()
                if recurrence is not None:
                    window[text] = loaded.model.config.window
                    recurring[text] = scores.by_recurrence(recurrence, window[text])
    if plot is not None:
        from transformer_vq.evaluation.figures import draw_positions
        from transformer_vq.evaluation.plots import save_figure

        save_figure(draw_positions(results, sorted(set(trained_on.values()))), plot)
    if json:
        found = {run: [b._asdict() for b in bins] for run, bins in results.items()}
        again = {run: [group._asdict() for group in groups] for run, groups in recurring.items()}
        print_json(
            {"split": split, "times": times, "trained_on": trained_on, "positions": found}
            | ({"recurrences": again} if recurrence else {})
        )
        return
    out = console()
    out.print(f"bits per byte by position, {split}, ± standard error over texts", soft_wrap=True)
    out.print()
    out.print(positions_table(results))
    for text, groups in recurring.items():
        out.print()
        out.print(f"{text}: where the {recurrence} tokens before last occurred in the same text", soft_wrap=True)
        out.print()
        out.print(recurrences_table(groups, window[text]))


def check_text(tokens: TokenFile, run: str, name: str, split: str, times: int, seq_len: int) -> None:
    """Raises ConfigError for a split that has no bytes, or no text of so many times the length in training."""
    from transformer_vq.config import ConfigError

    if tokens.bytes is None:
        raise ConfigError(f"{run}: was trained on tokens without their text, so there are no bits per byte")
    if len(tokens) <= times * seq_len:
        raise ConfigError(
            f"--times {times}: {run} was trained on {seq_len:,} tokens at a time, and {split} "
            f"{f'of {name} ' if name else ''}has {len(tokens):,} in all; at most {(len(tokens) - 1) // seq_len}"
        )


def positions_table(results: dict[str, list[Bin]]) -> Table:
    """One row a bin of positions, one column a run; runs trained on different lengths have rows of their own."""
    out = table("tokens before", *results)
    found = {run: {(b.start, b.stop): b for b in bins} for run, bins in results.items()}
    for start, stop in sorted({key for bins in found.values() for key in bins}):
        cells = (bins.get((start, stop)) for bins in found.values())
        out.add_row(f"{start:,}-{stop - 1:,}", *map(_score, cells))
    return out


def recurrences_table(groups: list[Recurrences], window: int) -> Table:
    """One row a group, nearest first."""
    from transformer_vq.evaluation.recurrence import words

    out = table("last occurred", "targets", "bits per byte")
    for group in groups:
        out.add_row(words(group.group, window), f"{group.tokens:,}", _score(group))
    return out


def _score(found: Bin | Recurrences | None) -> str:
    if found is None or found.bits_per_byte is None:
        return ""
    error = "" if math.isnan(found.standard_error) else f" ± {found.standard_error:.3f}"  # a single text has none
    return f"{found.bits_per_byte:.3f}{error}"
