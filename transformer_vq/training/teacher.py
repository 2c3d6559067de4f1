"""`train.teacher`: a finished run whose predictions another learns, in place of the text's own next tokens.

The teacher sees the same rows, in evaluation mode and without gradients; it is no part of the checkpoints.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from transformer_vq.config import ConfigError, RunConfig
from transformer_vq.data import Batch
from transformer_vq.data.tokenizers import Tokenizer
from transformer_vq.models import TransformerVQ
from transformer_vq.ops.divergence import summed_divergence

IGNORED = -100


def teacher_name(config: RunConfig) -> str | None:
    """The run that `train.teacher` names: inside `run_dir` where there is such a folder, so that a run may be moved.

    Raises ConfigError where a teacher cannot be had with these settings.
    """
    name = config.train.teacher
    if name is None:
        return None
    if config.data.order == "streams":
        raise ConfigError("train.teacher: needs data.order: windows; the state of a teacher is not carried")
    inside = Path(config.run_dir) / (name.rpartition("@")[0] or name)
    return str(Path(config.run_dir) / name) if inside.is_dir() else name


class Teacher:
    """The model of another run, and how far a model is from it."""

    def __init__(self, name: str, model: TransformerVQ) -> None:
        self.name = name
        self.model = model.requires_grad_(False).eval()

    def divergence(self, rows: Batch, logits: Tensor) -> Tensor:
        """Mean KL(teacher ‖ model) in nats over the labels that count: logits (B, T, vocabulary) of the rows -> ()."""
        with torch.no_grad():
            wanted = self.model(rows.tokens, segments=rows.segments).logits
        counted = (rows.labels != IGNORED).flatten()
        total = summed_divergence(logits.flatten(0, 1), wanted.flatten(0, 1), counted)
        return total / counted.sum().clamp_min(1)


def check_same_tokens(name: str, teacher: tuple[Tokenizer, int | None], own: tuple[Tokenizer, int | None]) -> None:
    """Raise ConfigError unless teacher and model, (tokenizer, vocab_size) each, mean the same by every number."""
    if teacher[0].sha256 != own[0].sha256 or teacher[1] != own[1]:
        raise ConfigError(
            f"train.teacher = {name}: reads {teacher[0].name}, {teacher[1]} rows of logits; this model {own[0].name}, "
            f"{own[1]}: they must be the same"
        )
