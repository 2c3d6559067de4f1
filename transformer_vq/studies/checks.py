"""What a study asks for beside its arms, checked before anything runs: a gate, emergence, recurrences, a branch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformer_vq.config import ConfigError
from transformer_vq.config.study import StudyConfig
from transformer_vq.studies.design import Design

FREE = {  # what an arm may have otherwise than its base: all that changes no shape of a weight outside the quantizers
    "model": (
        "quantizer", "per_layer", "window", "block_len", "cache", "gradients", "grad_through_cache", "backend",
        "dropout_embedding", "dropout_sinusoid", "dropout_residual", "dropout_layer", "checkpoint_activations",
        "logit_scale",
    ),
    "data": ("cache", "order", "document_boundaries"),
    "recall": ("task", "pairs", "power", "distances", "repeat", "examples"),
}  # fmt: skip


def check_gate(study: StudyConfig, design: Design) -> None:
    """Raises ConfigError for a gate that names no arm, or one twice."""
    if study.gate is None:
        return
    names = [arm.name for arm in design.arms]
    for key in ("better", "than"):
        if (name := getattr(study.gate, key)) not in names:
            raise ConfigError(f"gate.{key} = {name}: no such arm; there is {', '.join(names)}")
    if study.gate.better == study.gate.than:
        raise ConfigError(f"gate.than = {study.gate.than}: is gate.better too; name two arms")


def check_emergence(study: StudyConfig, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError for an arm that is not evaluated on the way."""
    for arm, config in settings.items():
        every, steps = config.eval.every, config.train.steps
        if study.emergence is not None and (every is None or every >= steps):
            raise ConfigError(
                f"emergence: {arm} has eval.every = {'null' if every is None else every} and train.steps = {steps}, no "
                "evaluation on the way; set eval.every"
            )


def check_recurrence(study: StudyConfig, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError for a metric of recurrences that an arm does not score."""
    for metric in study.metrics:
        for arm, config in settings.items():
            if metric.startswith("recurrence/") and getattr(config.eval, "recurrence", None) is None:
                raise ConfigError(f"metrics.{metric}: {arm} does not score recurrences; set eval.recurrence to 2 … 8")


def check_branch(base: Any, arms: Mapping[str, Any]) -> None:
    """Raises ConfigError for an arm that cannot go on from the base: another shape, another text."""
    for arm, settings in arms.items():
        for block, free in FREE.items():
            ours, theirs = (
                {} if (part := getattr(s, block, None)) is None else part.model_dump() for s in (settings, base)
            )
            for key in dict.fromkeys([*ours, *theirs]):
                if key not in free and ours.get(key) != theirs.get(key):
                    raise ConfigError(
                        f"branch: {arm} has {block}.{key} = {ours.get(key)}, and the base {theirs.get(key)}; "
                        "an arm goes on from the base's shape and data"
                    )
        if settings.model.position == "scalar" and settings.model.window != base.model.window:
            raise ConfigError(
                f"branch: {arm} has model.window = {settings.model.window}, and the base {base.model.window}; "
                "with position: scalar it is a shape"
            )
