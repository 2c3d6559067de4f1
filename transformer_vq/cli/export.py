"""`transformer-vq export RUN FOLDER`: a run for the Hugging Face hub, loadable without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transformer_vq.cli.arguments import Json
from transformer_vq.cli.console import console, print_json
from transformer_vq.cli.runs import folder_of, open_run

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, RUN\\[@best|@last|@STEP].")]
Target = Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")]


def export(run: Run, folder: Target, json: Json = False) -> None:
    """Write a run as a folder of the Hugging Face hub: weights, code, tokenizer and a model card.

    It loads elsewhere, without this package: `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`.
    """
    from transformer_vq.config import ConfigError

    if folder.exists():
        raise ConfigError(f"{folder}: is there already; name another")
    loaded = open_run(run)
    try:
        from transformer_vq.hub.export import export as write
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ConfigError("export: needs transformers: pip install 'transformer-vq[hub]'") from None
    files = write(loaded, folder_of(run), folder)
    if json:
        print_json({"run": run, "folder": str(folder), "files": files})
    else:
        console().print(f"{run} -> {folder}, {len(files)} files", soft_wrap=True)
        console().print(f'AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)', markup=False)
