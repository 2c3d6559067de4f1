"""`transformer-vq plot RUN`: the pictures of a run, also of one that is still going on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transformer_vq.cli.arguments import Json
from transformer_vq.cli.console import console, print_json


def plot(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")], json: Json = False) -> None:
    """Draw the pictures of a run into its folder plots/."""
    from transformer_vq.config import ConfigError
    from transformer_vq.config.load import find_config, read_yaml

    if not (run / "metrics.jsonl").is_file():
        raise ConfigError(f"{run}: no metrics.jsonl in there, not a run that has begun")
    if "images" in read_yaml(find_config(run)):
        from transformer_vq.images.plots import write_curves as write_plots
    else:
        from transformer_vq.evaluation.plots import write_plots
    written = write_plots(run)
    if json:
        print_json({"plots": [str(path) for path in written]})
        return
    out = console()
    for path in written:
        out.print(str(path), soft_wrap=True)
    if not written:
        out.print("nothing to draw yet: no record has numbers")
