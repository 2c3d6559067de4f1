"""Settings of a recall run: a language model on synthetic sequences that ask for something seen earlier."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from transformer_vq.config.base import Settings
from transformer_vq.config.model import TransformerVQConfig
from transformer_vq.config.run import CheckpointConfig, EvalConfig, TrainConfig


class RecallConfig(Settings):
    """What the sequences are; their length is `train.seq_len`."""

    task: Literal["mqar", "needle"] = Field(
        "mqar",
        description="mqar: several pairs at the start, asked for later (2312.04927) | needle: one pair at any "
        "distance, asked for at the end",
    )
    vocab: int = Field(128, ge=8, description="token ids; keys are the lower half, values the upper")
    pairs: int = Field(8, ge=1, description="mqar: key-value pairs of a sequence")
    power: float = Field(0.01, gt=0, description="mqar: gaps to the query follow a power law with exponent power - 1")
    distances: int = Field(8, ge=1, description="needle: so many distances, equally spaced up to the whole sequence")
    examples: int = Field(512, ge=1, description="sequences of each of valid and test")


class RecallRunConfig(Settings):
    """A recall run, the whole config file."""

    seed: int = Field(0, ge=0, description="of everything random: weights, training sequences")
    run_dir: str = Field("runs/recall", min_length=1, description="the one folder that a run writes to")
    recall: RecallConfig = RecallConfig()
    model: TransformerVQConfig = TransformerVQConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig(every=None)
    checkpoint: CheckpointConfig = CheckpointConfig(every=None, keep=1)

    @model_validator(mode="after")
    def _fits(self) -> RecallRunConfig:
        recall, length = self.recall, self.train.seq_len
        if self.model.vocab_size not in (None, recall.vocab):
            raise ValueError(f"model.vocab_size = {self.model.vocab_size}: is recall.vocab, {recall.vocab}, or null")
        if recall.task == "mqar" and recall.pairs > min(recall.vocab // 2 - 1, length // 4):
            most = min(recall.vocab // 2 - 1, length // 4)
            raise ValueError(f"recall.pairs = {recall.pairs}: at most {most} fit vocab {recall.vocab}, length {length}")
        if recall.task == "needle" and recall.distances > length // 2 - 1:
            most = length // 2 - 1
            raise ValueError(f"recall.distances = {recall.distances}: at most {most} fit train.seq_len = {length}")
        return self

    @property
    def settled_model(self) -> TransformerVQConfig:
        """`model` with the vocabulary of the task."""
        return self.model.model_copy(update={"vocab_size": self.recall.vocab})
