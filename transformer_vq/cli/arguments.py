"""Arguments that several commands take, with the words of their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, a recipe's name such as lm/tiny, or a run folder.")
]
Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN[@best|@last|@STEP]", help="A run folder, and which of its checkpoints; the last by default."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings to change, such as train.lr=3e-4."),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, all else on standard error.")
]


def check_plot(plot: Path | None) -> None:
    """Raises ConfigError, before any work, where --plot names a file that is there, or of a kind that is not drawn."""
    from transformer_vq.config import ConfigError

    if plot is not None and plot.exists():
        raise ConfigError(f"--plot {plot}: is there already; name another file")
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {plot}: must end in .png, .svg or .pdf")
