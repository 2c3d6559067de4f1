"""The way back of export.py: a folder of the Hugging Face hub, trained further by anybody or not, as a run.

Code in the folder is not run: weights and settings are read by the classes of this package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from transformer_vq.config import ConfigError, RunConfig, validate
from transformer_vq.config.load import parse_override, set_key
from transformer_vq.data.tokenizers import FILE, JsonTokenizer, Tokenizer, make_tokenizer, parse_tokenizer
from transformer_vq.hub.config import TransformerVQHubConfig
from transformer_vq.hub.models import TransformerVQForCausalLM
from transformer_vq.hub.runs import to_model
from transformer_vq.training.imported import write_run

SETTINGS = "config.json"
ADAPTER = "adapter_config.json"


def import_folder(folder: Path, target: Path, overrides: Sequence[str] = ()) -> int:
    """Write the run `target`; returns the step of its checkpoint, the optimizer steps behind the model.

    overrides: KEY=VALUE, settings of the run that differ from those it was exported with (without any: the defaults).
    Raises ConfigError for a folder that is none of ours, damaged or without a tokenizer, and a target that exists.
    """
    if target.exists():
        raise ConfigError(f"{target}: is there already; name another")
    tree = read_settings(folder)
    theirs = read_model(folder, tree)
    run = tree.get("run") or {}
    settings = run_settings(folder, run, theirs.config, target, overrides)
    chosen = any(text.startswith("data.tokenizer=") for text in overrides)
    tokenizer, known = None, False
    if not chosen:
        tokenizer, known = read_tokenizer(folder, run)
    if not (chosen or known):
        data = settings.data.model_copy(update={"tokenizer": str(target / FILE)})
        settings = settings.model_copy(update={"data": data})
    step = int(theirs.model.steps)
    write_run(to_model(theirs), settings, target, tokenizer=tokenizer, step=step)
    return step


def read_settings(folder: Path) -> dict[str, Any]:
    """`config.json`.  Raises ConfigError unless it is of a model of ours."""
    path = folder / SETTINGS
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder")
    if not path.is_file():
        merged = "; of adapters, import what model.merge_and_unload().save_pretrained wrote"
        raise ConfigError(f"{folder}: holds no {SETTINGS}{merged if (folder / ADAPTER).is_file() else ''}")
    try:
        tree = json.loads(path.read_bytes())
        kind = tree["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: damaged, or of no model: {error!r}") from None
    if kind != TransformerVQHubConfig.model_type:
        raise ConfigError(f"{path}: model_type = {kind}: must be {TransformerVQHubConfig.model_type}")
    return dict(tree)


def read_model(folder: Path, tree: dict[str, Any]) -> TransformerVQForCausalLM:
    """The weights, every one of them there and none too many.  Raises ConfigError."""
    try:
        config = TransformerVQHubConfig.from_dict(dict(tree))
    except ConfigError as error:
        raise ConfigError(f"{folder / SETTINGS}: {error}") from None
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    loaded: Any  # with `output_loading_info` a pair, of which their signature does not know
    try:
        loaded = TransformerVQForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype="auto",
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise ConfigError(f"{folder}: its weights are not readable: {' '.join(str(error).split())[:200]}") from None
    finally:
        if bars:
            logging.enable_progress_bar()
    model, found = cast(tuple[TransformerVQForCausalLM, dict[str, Any]], loaded)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(name if isinstance(name, str) else name[0] for name in found[what]):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ConfigError(f"{folder}: its weights are not those of its {SETTINGS}: {what[:-5]} {names[0]}{more}")
    model.eval()  # type: ignore[no-untyped-call]
    return model


def run_settings(
    folder: Path, run: dict[str, Any], config: TransformerVQHubConfig, target: Path, overrides: Sequence[str]
) -> RunConfig:
    """The run's config: what it was exported with, the model that the folder holds, and what the user says."""
    tree = {**dict(run.get("config") or {}), "run_dir": str(target), "seed": config.seed}
    tree["model"] = {**config.model, "vocab_size": config.vocab_size}
    wide = config.dtype == torch.float64
    precision = tree.get("train", {}).get("precision", "fp32")
    tree["train"] = {**tree.get("train", {}), "precision": "fp64" if wide else precision.replace("fp64", "fp32")}
    for override in overrides:
        if not override.startswith(("data.", "train.", "eval.", "checkpoint.")):
            raise ConfigError(f"{override}: model and seed are the folder's; only data, train, eval, checkpoint change")
        set_key(tree, *parse_override(override))
    try:
        return validate(tree, RunConfig).written()
    except ConfigError as error:
        raise ConfigError(f"{folder / SETTINGS}: {error}") from None


def read_tokenizer(folder: Path, run: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    """The folder's tokenizer, and whether it is the one that the run was trained with.

    Transformers lists the token for padding that export names as an added one, and writes a post-processor: both are
    undone where that gives the run's own.  Raises ConfigError when there is none.
    """
    path = folder / FILE
    if not path.is_file():
        raise ConfigError(f"{folder}: holds no {FILE}; save the tokenizer there, or say data.tokenizer=TOKENIZER.json")
    known = run.get("tokenizer") or {}
    try:
        content = path.read_text(encoding="utf-8")
        bare = without_named(content, known.get("post_processor"))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a tokenizer.json: {error!r}") from None
    for text in (content, bare):
        if JsonTokenizer(text, str(path)).sha256 == known.get("sha256"):
            spec = run["config"]["data"]["tokenizer"]
            ids = spec.startswith("tokens:")  # whose file, once others have written it, looks like one of words
            return make_tokenizer(spec, []) if ids else parse_tokenizer(text, str(path)), True
    return parse_tokenizer(content, str(path)), False


def without_named(content: str, post_processor: Any) -> str:
    """A `tokenizer.json` without the added tokens that its vocabulary has anyway, and with this post-processor."""
    tree = json.loads(content)
    vocabulary = tree["model"]["vocab"]
    known = vocabulary if isinstance(vocabulary, dict) else {piece[0]: i for i, piece in enumerate(vocabulary)}
    tree["added_tokens"] = [token for token in tree["added_tokens"] if known.get(token["content"]) != token["id"]]
    return json.dumps({**tree, "post_processor": post_processor})
