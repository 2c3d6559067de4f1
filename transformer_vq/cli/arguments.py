"""Arguments that several commands take, with the words of their help."""

from __future__ import annotations

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
