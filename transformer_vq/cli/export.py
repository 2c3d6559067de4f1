"""`transformer-vq export RUN FOLDER`: a run for the Hugging Face hub, loadable without this package; `import`: back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transformer_vq.cli.arguments import Json, Overrides
from transformer_vq.cli.console import console, print_json
from transformer_vq.cli.runs import folder_of, open_run

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, RUN\\[@best|@last|@STEP].")]
Target = Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")]
Source = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="What export or save_pretrained wrote, with a tokenizer.json.")
]
NewRun = Annotated[Path, typer.Argument(metavar="RUN", help="A new run folder.")]


def export(run: Run, folder: Target, json: Json = False) -> None:
    """Write a run as a folder of the Hugging Face hub: weights, code, tokenizer and a model card.

    It loads elsewhere, without this package: `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`.
    """
    from transformer_vq.config import ConfigError

    if folder.exists():
        raise ConfigError(f"{folder}: is there already; name another")
    loaded = open_run(run)
    from transformer_vq.hub.export import export as write

    files = write(loaded, folder_of(run), folder)
    if json:
        print_json({"run": run, "folder": str(folder), "files": files})
    else:
        console().print(f"{run} -> {folder}, {len(files)} files", soft_wrap=True)
        console().print(f'AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)', markup=False)


def import_(folder: Source, run: NewRun, overrides: Overrides = None, json: Json = False) -> None:
    """Make a run of an exported folder, trained further elsewhere or not: the way back of export.

    No code of the folder is run. The run is scored, sampled and exported as any other; train.init_from=RUN starts
    another from its weights. Settings of data, train, eval and checkpoint may be given, such as data.source=other.txt.
    """
    from transformer_vq.config import ConfigError

    if run.exists():
        raise ConfigError(f"{run}: is there already; name another")
    from transformer_vq.hub.importing import import_folder

    step = import_folder(folder, run, overrides or [])
    if json:
        print_json({"folder": str(folder), "run": str(run), "step": step})
    else:
        console().print(f"{folder} -> {run}, step {step}", soft_wrap=True)
        console().print(f"transformer-vq eval {run}", markup=False)
