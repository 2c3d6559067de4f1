"""`transformer-vq convert SOURCE TARGET`: the paper's own checkpoints to runs of ours, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transformer_vq.cli.arguments import Json, Overrides
from transformer_vq.cli.console import console, print_json
from transformer_vq.cli.runs import folder_of, open_run

if TYPE_CHECKING:
    from transformer_vq.config import RunConfig
    from transformer_vq.convert.files import ReferenceFile

Source = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="A checkpoint_N or .npz of the paper's code, or RUN\\[@best|@last|@STEP]."),
]
Target = Annotated[
    Path, typer.Argument(metavar="TARGET", help="A new run folder; or, from a run, a new .npz or checkpoint_N.")
]
Settings = Annotated[
    str | None, typer.Option("--config", help="The model's settings, where SOURCE does not hold them: lm/enwik8")
]


def convert(
    source: Source, target: Target, overrides: Overrides = None, config: Settings = None, json: Json = False
) -> None:
    """Turn a checkpoint of the paper's own implementation into a run, or a run into one. Arrays stay bit for bit.

    A run made from a checkpoint keeps its optimizer's state and gives it back. Other runs go out as parameters alone,
    which the paper's code reads with `restore_checkpoint(FOLDER, target=None)["params"]`.
    """
    from transformer_vq.config import ConfigError

    if target.exists():
        raise ConfigError(f"{target}: is there already; name another")
    if (folder_of(source) / "config.yaml").is_file():
        if config or overrides:
            raise ConfigError("--config and KEY=VALUE: are for reading the paper's checkpoints; a run has its own")
        arrays = export(source, target)
    else:
        arrays = take_in(source, target, config, overrides or [])
    if json:
        print_json({"source": source, "target": str(target), "arrays": arrays})
    else:
        console().print(f"{source} -> {target}, {arrays} arrays", soft_wrap=True)


def export(run: str, target: Path) -> int:
    """A run as the reference would have saved it; returns how many arrays it has."""
    loaded = open_run(run)

    from transformer_vq.config import ConfigError
    from transformer_vq.convert.files import read_kept, write_reference
    from transformer_vq.convert.names import reference_settings, to_reference

    try:
        params, settings = to_reference(loaded.model), reference_settings(loaded.model.config)
    except ValueError as error:
        raise ConfigError(f"{run}: {error}") from None
    unused, rest = read_kept(folder_of(run))
    params |= unused
    write_reference(target, params, settings, rest if loaded.step == 0 else None)  # it belongs to these parameters
    return len(params)


def take_in(source: str, target: Path, config: str | None, overrides: list[str]) -> int:
    """The reference's checkpoint as a run with one checkpoint, of step 0; returns how many arrays it has."""
    from transformer_vq.config import ConfigError, RunConfig, load_config, validate
    from transformer_vq.config.load import parse_override, set_key
    from transformer_vq.convert.files import read_reference, write_kept
    from transformer_vq.convert.names import UNUSED, model_of, reference_config
    from transformer_vq.training.imported import write_run

    file = read_reference(Path(source))
    if "token_embedder/embs" not in file.params:
        raise ConfigError(f"{source}: holds no token_embedder/embs; not a checkpoint of a language model of the paper")
    if config is not None:
        settings = load_config(config, overrides, RunConfig)
    elif file.settings is not None:
        try:
            tree = RunConfig(model=reference_config(file.settings)).model_dump()
        except ValueError as error:
            raise ConfigError(f"{source}: {error}") from None
        for override in overrides:
            set_key(tree, *parse_override(override))
        settings = validate(tree, RunConfig)
    else:
        raise ConfigError(f"{source}: holds no settings; say which the model has: --config lm/enwik8")
    settings = settled(settings, file, source, target, any(text.startswith("data.tokenizer") for text in overrides))
    try:
        model = model_of(file.params, settings.model)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None
    unused = {} if settings.model.tied_embedding else {UNUSED: file.params[UNUSED]}
    write_run(model, settings, target, lambda run: write_kept(run, unused, file.rest))
    return len(file.params)


def settled(settings: RunConfig, file: ReferenceFile, source: str, target: Path, chosen: bool) -> RunConfig:
    """With the vocabulary, the tokenizer that counts so, the precision of the arrays, and the folder.

    chosen: the user named a tokenizer.  Raises ConfigError where none is known.
    """
    from transformer_vq.config import ConfigError

    embedding = file.params["token_embedder/embs"]
    tokenizer = settings.data.tokenizer
    if tokenizer.startswith("bpe:") and chosen:
        raise ConfigError(f"data.tokenizer = {tokenizer}: would be trained anew; say data.tokenizer=TOKENIZER.json")
    if not chosen:
        tokenizer = {256: "bytes", 259: "bytes+3"}.get(len(embedding), "")
        if not tokenizer:
            raise ConfigError(
                f"{source}: has {len(embedding):,} token ids, which are not bytes; say data.tokenizer=TOKENIZER.json"
            )
    precision = "fp64" if embedding.dtype.name == "float64" else settings.train.precision
    return settings.model_copy(
        update={
            "run_dir": str(target),
            "data": settings.data.model_copy(update={"tokenizer": tokenizer}),
            "model": settings.model.model_copy(update={"vocab_size": len(embedding)}),
            "train": settings.train.model_copy(update={"precision": precision}),
        }
    )
