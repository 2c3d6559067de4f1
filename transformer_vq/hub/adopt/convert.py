"""From a pretrained softmax decoder to a run of ours: settings, codebooks, measurements, and the folder.

RUN/             an ordinary run, whose checkpoint of step 0 is the converted model; training goes on from there
RUN/original/    the model as it came, a run with full attention: what is scored before, and the teacher
RUN/adopt.json   every number of the report
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transformer_vq.config import ConfigError, RunConfig, TransformerVQConfig, validate
from transformer_vq.config.load import parse_override, set_key
from transformer_vq.config.model import layer_range
from transformer_vq.data import Mixture, check_sources, mixed_batch, prepare_sources
from transformer_vq.evaluation import evaluate_sources
from transformer_vq.files import write_text
from transformer_vq.hub.adopt import measure
from transformer_vq.hub.adopt.llama import from_llama, load, settings
from transformer_vq.models import TransformerVQ
from transformer_vq.training.imported import write_run

ORIGINAL = "original"
NUMBERS = "adopt.json"
LONGEST = 1024
"""Tokens of a training sequence, at most, unless told otherwise."""
CALIBRATION = 1
"""Added to the run's seed: calibration reads other windows than training."""


class Wishes(NamedTuple):
    """What the command line asks for, beside settings."""

    tokens: int = 1_000_000
    """To be tuned on; 0: none."""
    layers: str = "all"
    """`all`, ranges like "0,2-3", or "best:N": the N layers whose conversion costs least."""
    objective: str = "distill"
    """distill: the original's predictions are learned | text: the text is."""
    calibrate: int = 65_536
    """Tokens whose keys make the codebooks."""
    measure: int = 32_768
    """Tokens that damage and errors by layer are measured on, of the valid split."""


def adopt(
    name: str,
    target: Path,
    overrides: Sequence[str],
    wishes: Wishes,
    say: Callable[[str], None] = lambda _: None,
) -> RunConfig:
    """Convert the model `name` and write `target`, whole or not at all; tuning is then a matter of `training.run`.

    Raises ConfigError, one line, before anything is written.
    """
    if target.exists():
        raise ConfigError(f"{target}: is there already; name another, or --resume to go on with it")
    theirs = load(name)
    config = run_config(name, theirs, target, overrides, wishes)
    original = from_llama(theirs, name)
    kind = theirs.config.model_type
    del theirs
    say(f"{name}: {kind}, {sum(p.numel() for p in original.parameters()):,} parameters")
    mixture = prepare_sources(config.data)
    check_sources(mixture, config.train.seq_len)
    check_vocabulary(name, original.config, mixture)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    original.to(device)
    candidate = converted_model(original, config.model, config.seed).to(device)
    say(f"codebooks: k-means on the keys of {wishes.calibrate:,} tokens")
    calibrated = measure.make_codebooks(
        original, candidate, windows(mixture, config, wishes.calibrate, config.seed + CALIBRATION)
    )
    key = "bits_per_byte" if mixture.knows_bytes else "bits_per_token"

    def score(model: TransformerVQ) -> float:
        return float(scores(model, mixture, config, "valid", wishes.measure)[key])

    say(f"damage by layer: one layer converted at a time, {wishes.measure:,} tokens of valid")
    _, damage = measure.damage_by_layer(original, candidate, score)
    texts = list(windows(mixture, config, wishes.measure, config.seed + CALIBRATION, "valid"))
    errors = measure.errors_by_layer(original, candidate, texts)
    chosen = chosen_layers(wishes.layers, damage)
    final = with_layers(config, chosen)
    model = converted_model(original, final.model, final.seed, candidate)
    say("the whole test split: before, and converted")
    numbers: dict[str, Any] = {
        "model": name,
        "type": kind,
        "unit": key,
        "context": config.eval.context,
        "calibration_tokens": calibrated,
        "measured_tokens": wishes.measure,
        "objective": wishes.objective,
        "before": scores(original, mixture, config, "test"),
        "converted": scores(model, mixture, config, "test"),
        "layers": [
            {"layer": i, "converted": i in chosen, "damage": damage[i], **errors[i]} for i in range(len(damage))
        ],
    }

    def add(run: Path) -> None:
        write_run(original.cpu(), original_config(config, original.config, target / ORIGINAL), run / ORIGINAL)
        write_text(run / NUMBERS, json.dumps(numbers, indent=1))

    write_run(model.cpu(), final, target, add)
    return final


def run_config(name: str, theirs: Any, target: Path, overrides: Sequence[str], wishes: Wishes) -> RunConfig:
    """The run's settings: what the weights fix, what suits an adopted model, and over both what the user says.

    Raises ConfigError for a setting that the weights fix otherwise.
    """
    given = settings(theirs)
    length = min(getattr(theirs.config, "max_position_embeddings", LONGEST), LONGEST)
    tree: dict[str, Any] = {
        "run_dir": str(target),
        "data": {"tokenizer": name},
        "model": {
            **given,
            "window": max(1, length // 4),
            "window_keys": "exact",
            "quantizer": {"kind": "vq", "codes": 512, "init": "kmeans"},
        },
        "train": {"batch_size": 8, "seq_len": length, "lr": 3e-4, "weight_decay": 0.0},
    }
    said = dict(parse_override(override) for override in overrides)
    for key, value in said.items():
        set_key(tree, key, value)
    wrong = [key for key in given if key != "quantizer" and tree["model"][key] != given[key]]
    if wrong:
        raise ConfigError(f"model.{wrong[0]} = {tree['model'][wrong[0]]}: the weights of {name} fix {given[wrong[0]]}")
    train = tree["train"]
    if isinstance(train.get("batch_size"), int) and isinstance(train.get("seq_len"), int) and train["batch_size"] > 0:
        tokens = wishes.tokens or Wishes().tokens  # none now: a later --resume tunes
        steps = math.ceil(tokens / max(1, train["batch_size"] * train["seq_len"]))
        train.setdefault("steps", steps)
    if isinstance(train.get("steps"), int):
        train.setdefault("warmup", train["steps"] // 20)
        train.setdefault("log_every", max(1, min(10, train["steps"] // 20)))
    tree.setdefault("eval", {}).setdefault("context", train["seq_len"])
    tree["eval"].setdefault("every", None)
    if wishes.objective == "distill":
        train.setdefault("teacher", ORIGINAL)
    if tree["model"]["quantizer"].get("kind", "vq") not in ("vq", "none"):
        raise ConfigError(f"model.quantizer.kind = {tree['model']['quantizer']['kind']}: adopt makes codebooks for vq")
    config = validate(tree, RunConfig)
    if any(q.kind not in ("vq", "none") for q in config.model.layer_quantizers()):
        raise ConfigError("model.per_layer: adopt makes codebooks for kind: vq; layers that are not converted are none")
    if any(
        getattr(q, "init", "kmeans") != "kmeans" or getattr(q, "start_step", 0) for q in config.model.layer_quantizers()
    ):
        raise ConfigError("model.quantizer: adopt makes the codebooks itself: init: kmeans and start_step: 0")
    if wishes.layers != "all" and not config.model.cache:
        raise ConfigError("--layers: with model.cache=false no layer keeps every key; all are converted")
    chosen_layers(wishes.layers, [0.0] * config.model.layers)
    return config


def check_vocabulary(name: str, config: TransformerVQConfig, mixture: Mixture) -> None:
    """Raise ConfigError where the tokenizer has tokens that the model has no rows for."""
    if mixture.tokenizer.vocab_size > (config.vocab_size or 0):
        raise ConfigError(
            f"data.tokenizer: has {mixture.tokenizer.vocab_size:,} tokens, {name} has rows for {config.vocab_size:,}"
        )


def converted_model(
    original: TransformerVQ, config: TransformerVQConfig, seed: int, codebooks: TransformerVQ | None = None
) -> TransformerVQ:
    """The original's weights under other settings, with the codebooks of a model that has them."""
    model = TransformerVQ(config, seed=seed).to(original.embedding.weight.dtype).eval()
    state = {**({} if codebooks is None else codebooks.state_dict()), **original.state_dict()}
    own = model.state_dict()
    model.load_state_dict({key: tensor for key, tensor in state.items() if key in own}, strict=False)
    return model.to(original.embedding.weight.device)


def chosen_layers(asked: str, damage: Sequence[float]) -> list[int]:
    """The layers to convert.  Raises ConfigError for text that names none."""
    count = len(damage)
    if asked.startswith("best:"):
        number = asked.removeprefix("best:")
        if not number.isdecimal() or not 1 <= int(number) <= count:
            raise ConfigError(f"--layers {asked}: written best:N, N from 1 to {count}")
        return sorted(sorted(range(count), key=lambda i: damage[i])[: int(number)])
    chosen: set[int] = set()
    for text in asked.split(","):
        try:
            chosen |= set(layer_range(text.strip(), count))
        except ValueError as error:
            raise ConfigError(f"--layers {error}, several with commas, or best:N") from None
    return sorted(chosen)


def with_layers(config: RunConfig, chosen: Sequence[int]) -> RunConfig:
    """The same run where all but the chosen layers keep every key."""
    full = config.model.resolved()
    assert full.per_layer is not None
    others = {i: {"kind": "none"} for i in full.per_layer if int(i) not in chosen}
    model = full.model_copy(update={"per_layer": {**full.per_layer, **others}})
    return config.model_copy(update={"model": model})


def original_config(config: RunConfig, model: TransformerVQConfig, run_dir: Path) -> RunConfig:
    """Settings of the original as a run of its own: the same data and evaluation."""
    train = config.train.model_copy(update={"teacher": None})
    return config.model_copy(update={"run_dir": str(run_dir), "model": model, "train": train})


def windows(mixture: Mixture, config: RunConfig, tokens: int, seed: int, split: str = "train") -> Iterator[Tensor]:
    """About so many tokens of a split in random windows of the training length, (B, T) int64."""
    T, size = config.train.seq_len, config.train.micro_batch or config.train.batch_size
    files = mixture.files(split)
    T = min(T, *(len(file) - 1 for file in files.values()))
    for step in range(max(1, math.ceil(tokens / (size * T)))):
        yield mixed_batch(files, mixture.shares, seed, step, range(size), size, T).tokens


def scores(
    model: TransformerVQ, mixture: Mixture, config: RunConfig, split: str, max_tokens: int | None = None
) -> dict[str, Any]:
    """Loss, perplexity and bits of a split, as the run itself will be evaluated."""
    found = evaluate_sources(
        model,
        mixture,
        split,
        context=config.eval.context or config.train.seq_len,
        batch_size=config.eval.batch_size,
        max_tokens=max_tokens,
        reset_documents=config.data.document_boundaries == "reset",
    )
    return {key: value for key, value in found.items() if "/" not in key}
