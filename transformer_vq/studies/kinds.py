"""What a study can vary: one line a kind of run, chosen by the top-level key of the base config."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pydantic import BaseModel

from transformer_vq.config import ConfigError, Settings, TransformerVQConfig


@dataclass(frozen=True)
class Kind:
    """A kind of run, named by strings so that planning a study loads no torch."""

    schema: str
    """module:Class of the settings."""
    runner: str
    """module:function (settings, resume=, overwrite=, quiet=) -> summary, leaving a run folder."""
    command: str | None
    """The console command that does the same, where there is one."""
    check_names: str | None = None
    """module:function (settings.model) that raises ConfigError for a name that stands for nothing."""

    def settings_class(self) -> type[Settings]:
        """The class behind `schema`."""
        schema: type[Settings] = load(self.schema)
        return schema


NAMES = "transformer_vq.models.names:check_names"
KINDS = {
    "recall": Kind("transformer_vq.config.recall:RecallRunConfig", "transformer_vq.training.recall:run", None, NAMES),
    "model": Kind("transformer_vq.config:RunConfig", "transformer_vq.training:run", "train", NAMES),
    "images": Kind("transformer_vq.config.images:ImageRunConfig", "transformer_vq.images:run", "images"),
    "toy": Kind("transformer_vq.config.toy:ToyRunConfig", "transformer_vq.studies.toy:run", None),
}


def load(name: str) -> Any:
    """The object that `module:name` stands for."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def kind_of(tree: Mapping[str, Any], source: str) -> Kind:
    """The kind of a base config.  Raises ConfigError when no known key is there, or more than one."""
    found = [key for key in KINDS if key in tree]
    if found == ["recall", "model"]:  # a recall run has a model too
        found = ["recall"]
    if len(found) != 1:
        raise ConfigError(f"base = {source}: must hold one of the keys {', '.join(KINDS)}, and holds {found or 'none'}")
    return KINDS[found[0]]


def digest(settings: Settings) -> str:
    """Content hash of a run: all that its result depends on, so neither `run_dir` nor the place of the token cache.

    Settings at their default do not count: one that is added later, with a default that changes nothing, leaves the
    hash as it was, and finished runs stay finished. Quantizers count layer by layer, however the config spells them.
    """
    tree = _essence(settings)
    tree.pop("run_dir", None)
    tree.get("data", {}).pop("cache", None)
    if not tree.get("data", True):
        del tree["data"]
    if match := re.fullmatch(r".*-([0-9a-f]{12})(@\w+)?", tree.get("train", {}).get("init_from") or ""):
        tree["train"]["init_from"] = match[1] + (match[2] or "")  # a run of a study, wherever the study's folder is
    text = json.dumps(tree, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _essence(value: Any) -> Any:
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        tree = {
            name: _essence(getattr(value, name))
            for name, field in fields.items()
            if name == "kind" or getattr(value, name) != field.get_default(call_default_factory=True)
        }
        if isinstance(value, TransformerVQConfig):
            tree.pop("per_layer", None)
            tree["quantizer"] = [_essence(q) for q in value.layer_quantizers()]
        return tree
    if isinstance(value, Mapping):
        return {str(key): _essence(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_essence(v) for v in value]
    return value


def steps_for_tokens(settings: Any, tokens: int) -> int:
    """Optimizer steps that read so many training tokens, at least one."""
    return max(1, round(tokens / _tokens_per_step(settings)))


def flops_per_step(settings: Any) -> float:
    """Training FLOPs of an optimizer step: three times the forward pass (`models/describe.py` says what is counted)."""
    from transformer_vq.models.describe import TRAINING, describe

    tokens = _tokens_per_step(settings)
    forward = describe(_with_vocabulary(settings), settings.train.seq_len)["flops_per_token"]
    return TRAINING * float(forward) * tokens


def property_of(name: str, settings: Any) -> float | None:
    """`codes`, or `state` of a language model, for the x axis of a figure; None for other names and kinds."""
    if name == "codes" and (hasattr(settings, "images") or hasattr(settings, "model")):
        quantizer = settings.images.quantizer if hasattr(settings, "images") else settings.model.layer_quantizers()[0]
        size: int | None = getattr(quantizer, "size", None)
        return None if size is None else float(size)
    if name != "state" or not hasattr(settings, "model"):
        return None
    from transformer_vq.models.describe import describe

    return float(describe(_with_vocabulary(settings), settings.train.seq_len)["state_numbers"])


def _with_vocabulary(settings: Any) -> TransformerVQConfig:
    """The model's config with `vocab_size`, which the run takes from its tokenizer."""
    model: TransformerVQConfig = getattr(settings, "settled_model", settings.model)
    if model.vocab_size is not None:
        return model
    kind, _, size = settings.data.tokenizer.partition(":")
    if kind.startswith("bytes+"):
        kind, size = "bytes", str(256 + int(kind.removeprefix("bytes+")))
    if kind not in ("bytes", "bpe", "tokens"):
        raise ConfigError("model.vocab_size: must be set in base for its FLOPs and state when the tokenizer is a file")
    return model.model_copy(update={"vocab_size": int(size) if size else 256})


def _tokens_per_step(settings: Any) -> int:
    if not hasattr(settings, "model"):
        raise ConfigError("budget: is for language models; image runs set train.steps in overrides")
    return int(settings.train.batch_size * settings.train.seq_len)
