"""The self-check: does every layer's quantizer do what its config says, on real batches?

How a layer's quantizer is run and watched stands here; what is then checked, in checks.py.

Axes:  B batch  H heads  T length  K key width  S codes  N keys
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transformer_vq.bench.checks import Check, Seen, examine
from transformer_vq.models import TransformerVQ
from transformer_vq.quantizers import Quantizer
from transformer_vq.quantizers.probe import KeyProbe


@dataclass(frozen=True)
class LayerReport:
    """All findings about one layer."""

    layer: int
    kind: str
    estimator: str | None
    checks: list[Check]

    @property
    def status(self) -> str:
        """The worst of the checks."""
        return max((c.status for c in self.checks), key=("none", "green", "amber", "red").index, default="none")

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"status": self.status, "checks": {c.name: asdict(c) for c in self.checks}}


class Batch(NamedTuple):
    """tokens, labels (B, T) int64; segments (B, T) int64 or None."""

    tokens: Tensor
    labels: Tensor
    segments: Tensor | None = None


def diagnose(model: TransformerVQ, batches: Sequence[Batch]) -> list[LayerReport]:
    """Examine every layer on `batches`. The model is left as it was: copies are trained.

    A quantizer that still waits for its `start_step` is examined as it will be when it starts.
    Raises ConfigError when it cannot start on the first batch (fewer keys than codes).
    """
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # noise would only blur what is measured
    start(model, batches[0])
    seen = observe(model, batches)
    moved = codebook_changes(model, batches[0])
    reports = []
    for i, (quantizer, settings) in enumerate(zip(model.quantizers, model.config.layer_quantizers(), strict=True)):
        estimator = getattr(settings, "estimator", None)
        checks = examine(quantizer, estimator, seen[i], moved[i]) if i in seen else []
        reports.append(LayerReport(i, settings.kind, estimator, checks))
    return reports


def start(model: TransformerVQ, batch: Batch) -> None:
    """Bring every quantizer past its start, with a codebook from the keys of `batch` where it wants one."""
    waiting = [getattr(settings, "start_step", 0) for settings in model.config.layer_quantizers()]
    steps = [getattr(quantizer, "step", 0) for quantizer in model.quantizers]
    model.set_step(max(*waiting, *steps, 0))
    with torch.no_grad():
        model(batch.tokens, segments=batch.segments)
    model.discard_codebook_statistics()


def observe(model: TransformerVQ, batches: Sequence[Batch]) -> dict[int, list[Seen]]:
    """Run forward and backward, and keep what each quantizing layer's quantizer saw: layer -> one `Seen` a batch."""
    quantizers = quantizing(model)
    seen: dict[int, list[Seen]] = {i: [] for i in quantizers}
    with KeyProbe(quantizers) as probe:
        for batch in batches:
            out = model(batch.tokens, labels=batch.labels, segments=batch.segments)
            task, own = probe.gradients(out.loss_lm), probe.gradients(out.loss_quantizers)
            for i, quantizer in quantizers.items():
                codebook = quantizer.codebook.detach()
                seen[i].append(Seen(probe.keys[i].detach(), probe.results[i], codebook, task[i], own[i]))
    model.discard_codebook_statistics()
    return seen


def quantizing(model: TransformerVQ) -> dict[int, Quantizer]:
    """The quantizers by layer, without those of `kind: none`."""
    settings = model.config.layer_quantizers()
    return {i: quantizer for i, quantizer in enumerate(model.quantizers) if settings[i].kind != "none"}


def codebook_changes(model: TransformerVQ, batch: Batch) -> dict[int, float]:
    """Largest change of a codebook entry, by layer, in one training step of a copy (AdamW 1e-3 for parameters)."""
    trained = copy.deepcopy(model)
    quantizers = quantizing(trained)
    before = {i: quantizer.codebook.detach().clone() for i, quantizer in quantizers.items()}
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, weight_decay=0.0)  # decay alone moves everything
    out = trained(batch.tokens, labels=batch.labels, segments=batch.segments)
    out.loss.backward()
    optimizer.step()
    trained.apply_codebook_statistics()
    return {i: (q.codebook.detach() - before[i]).abs().max().item() for i, q in quantizers.items()}
