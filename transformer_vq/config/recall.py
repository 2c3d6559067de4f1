"""Settings of a recall run: a language model on sequences that ask for something seen earlier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from transformer_vq.config.base import ConfigError, Settings
from transformer_vq.config.load import load_config, read_config
from transformer_vq.config.model import TransformerVQConfig
from transformer_vq.config.run import CheckpointConfig, DataConfig, EvalConfig, RunConfig, TrainConfig


class RepeatConfig(Settings):
    """Strings of random letters that come back in windows of a text."""

    span: tuple[int, int] = Field((12, 24), strict=False, description="shortest and longest string, in tokens")
    gap: int = Field(
        24,
        ge=0,
        description="fewest tokens between a string and its return; of k windows, k·model.window",
    )
    cue: int = Field(4, ge=1, description="first tokens of a return that are not scored: they say which string it is")
    returns: int = Field(3, ge=1, description="a string comes back 1 to so many times in training, once in valid, test")
    periodic: float = Field(
        0.5, ge=0, le=1, description="share of training rows that are one string repeated to the end; a curriculum"
    )

    @model_validator(mode="after")
    def _ordered(self) -> RepeatConfig:
        if not self.cue < self.span[0] <= self.span[1]:
            raise ValueError(f"span = {list(self.span)}: shortest, then longest, both above cue = {self.cue}")
        return self


class RecallConfig(Settings):
    """What the sequences are; their length is `train.seq_len`."""

    task: Literal["mqar", "needle", "repeat"] = Field(
        "mqar",
        description="mqar: several pairs at the start, asked for later (2312.04927) | needle: one pair at any "
        "distance, asked for at the end | repeat: strings of letters that come back in windows of the text of `data`",
    )
    vocab: int = Field(128, ge=8, description="mqar, needle: token ids; keys are the lower half, values the upper")
    pairs: int = Field(8, ge=1, description="mqar: key-value pairs of a sequence")
    power: float = Field(0.01, gt=0, description="mqar: gaps to the query follow a power law with exponent power - 1")
    distances: int = Field(8, ge=1, description="needle: so many distances, equally spaced up to the whole sequence")
    repeat: RepeatConfig = Field(RepeatConfig(), description="repeat: the strings")
    examples: int = Field(512, ge=1, description="sequences of each of valid and test")
    eval_lengths: list[Annotated[int, Field(ge=1)]] = Field(
        [],
        strict=False,
        description="further lengths at which the finished model is tested, longer than train.seq_len or not",
    )


class RecallRunConfig(Settings):
    """A recall run, the whole config file."""

    seed: int = Field(0, ge=0, lt=2**63, description="of everything random: weights, training sequences")
    run_dir: str = Field("runs/recall", min_length=1, description="the one folder that a run writes to")
    recall: RecallConfig = RecallConfig()
    data: DataConfig | None = Field(None, description="of task: repeat, the text; order and boundaries do not count")
    model: TransformerVQConfig = TransformerVQConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig(every=None)
    checkpoint: CheckpointConfig = CheckpointConfig(every=None, keep=1)

    @model_validator(mode="after")
    def _fits(self) -> RecallRunConfig:
        recall, length = self.recall, self.train.seq_len
        if (self.data is None) == (recall.task == "repeat"):
            why = "task: repeat reads a text; name one" if self.data is None else f"task: {recall.task} reads no text"
            raise ValueError(f"data: {why}")
        if self.eval.recurrence is not None:
            raise ValueError(
                "eval.recurrence: is for text; a recall run scores its questions, by distance; leave it out"
            )
        if recall.task != "repeat" and self.model.vocab_size not in (None, recall.vocab):
            raise ValueError(f"model.vocab_size = {self.model.vocab_size}: is recall.vocab, {recall.vocab}, or null")
        _check_length(recall, length, f"train.seq_len = {length}")
        for other in recall.eval_lengths:
            _check_length(recall, other, f"recall.eval_lengths = {other}")
        return self

    @property
    def settled_model(self) -> TransformerVQConfig:
        """`model` with the vocabulary of the task; of task: repeat the tokenizer has it."""
        if self.recall.task == "repeat":
            return self.model
        return self.model.model_copy(update={"vocab_size": self.recall.vocab})


def load_text_config(run: str | Path, overrides: Sequence[str]) -> RunConfig:
    """The settings of a language model's run; those of a recall run, too, when it reads a text, without its questions.

    Raises ConfigError for a recall run whose tokens are no text.
    """
    if "recall" not in read_config(run):
        return load_config(run, overrides, RunConfig)
    settings = load_config(run, overrides, RecallRunConfig)
    if settings.data is None:
        raise ConfigError(f"{run}: its tokens are no text (recall.task: {settings.recall.task}); only repeat has one")
    return RunConfig(**{name: getattr(settings, name) for name in RunConfig.model_fields})


def _check_length(recall: RecallConfig, length: int, name: str) -> None:
    """Raises ValueError when sequences of a length have no room for what they ask."""
    if recall.task == "repeat":
        need = 2 * recall.repeat.span[1] + recall.repeat.gap
        if need > length + 1:
            raise ValueError(
                f"{name}: too short for recall.repeat, {recall.repeat.span[1]} tokens twice and "
                f"gap = {recall.repeat.gap} between; at least {need - 1}"
            )
    most = min(recall.vocab // 2 - 1, length // 4)
    if recall.task == "mqar" and recall.pairs > most:
        raise ValueError(f"recall.pairs = {recall.pairs}: at most {most} fit vocab {recall.vocab}, {name}")
    if recall.task == "needle" and recall.distances > length // 2 - 1:
        raise ValueError(f"recall.distances = {recall.distances}: at most {length // 2 - 1} fit {name}")
