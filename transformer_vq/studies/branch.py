"""Arms that go on from one base a seed: its weights, a codebook of their own, a learning rate schedule of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformer_vq.config import Settings


def branched(settings: Settings, base: Path) -> tuple[Settings, dict[str, Any]]:
    """A run's settings when it goes on from the run in `base`, and the changes as dotted keys.

    No quantizer comes along, so that an arm whose kind is the base's has no start over the others. A codebook begins
    with k-means on the keys of the first step where `init` is not set: those of a trained model are no normal numbers.
    """
    model, train = settings.model, settings.train  # type: ignore[attr-defined]
    changes: dict[str, Any] = {"train.init_from": str(base), "train.init_quantizers": "fresh"}
    quantizer = model.quantizer
    if "init" in type(quantizer).model_fields and "init" not in quantizer.model_fields_set:
        quantizer = quantizer.model_copy(update={"init": "kmeans"})
        changes["model.quantizer.init"] = "kmeans"
    layers = {
        layer: {**own, "init": "kmeans"}
        if own.get("kind") == "vq" != model.quantizer.kind and "init" not in own
        else own
        for layer, own in (model.per_layer or {}).items()
    }
    if layers != (model.per_layer or {}):
        changes["model.per_layer"] = layers
    model = model.model_copy(update={"quantizer": quantizer, "per_layer": layers or model.per_layer})
    train = train.model_copy(update={"init_from": str(base), "init_quantizers": "fresh"})
    return settings.model_copy(update={"model": model, "train": train}), changes
