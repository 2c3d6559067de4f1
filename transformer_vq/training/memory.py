"""How much memory a run takes on one process, and whether the device has it.

The parts come from the model itself (`models/footprint.py`); here they are put together as a step goes: at any moment
parameters, optimizer state, carried state and the gradients made so far are there, and beside them

    forward     what the layers so far keep, and the most that the next one needs
    loss        what all layers keep, and the most that norm, head and loss need
    probe       what all keep, and one backward pass that keeps it; in the steps whose record holds `task_share`
    backward    what the layers left keep, and the most that this one needs
    update      all gradients, and the optimizer's temporaries

The peak is the largest. Python, PyTorch and its libraries take some 0.4 GiB more, and an allocator rounds up.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil
import torch

from transformer_vq.config import RunConfig, TransformerVQConfig
from transformer_vq.config.run import OptimizationConfig
from transformer_vq.models import footprint
from transformer_vq.models.language_model import TransformerVQ
from transformer_vq.training.optimizers import hidden_matrices

CLEARLY_FITS = 8
"""Where even a rough count takes no more than this part of what is there, nobody asks for a better one."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step on one process, at its peak. The parts add up to the total."""

    parameters: int
    """With codebooks and other buffers."""
    optimizer: int
    state: int
    """Carried over from the steps before, with `order: streams`."""
    gradients: int
    """Those that are there at the peak."""
    activations: int
    """What layers and loss have kept for the backward pass at the peak, the batch's embeddings included."""
    working: int
    """What is in use at that moment and then gone."""
    peak: str
    """When it is: forward | loss | probe | backward | update."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.optimizer + self.state + self.gradients + self.activations + self.working

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "total": self.total}


def training_memory(settings: RunConfig, device: str, processes: int = 1) -> Memory:
    """Of one of `processes` on a `device` (cpu, cuda).  `model.vocab_size` must be set."""
    return max((_peak(settings, model, device, processes) for model in _phases(settings.model)), key=lambda m: m.total)


def _phases(model: TransformerVQConfig) -> list[TransformerVQConfig]:
    """The model as it is in the end, and with unquantized keys where quantizers start late."""
    late = [i for i, q in enumerate(model.layer_quantizers()) if getattr(q, "start_step", 0)]
    if not late:
        return [model]
    whole = model.resolved()
    warming = {**(whole.per_layer or {}), **{str(i): {"kind": "none"} for i in late}}
    return [model, whole.model_copy(update={"per_layer": warming})]


def _peak(settings: RunConfig, model: TransformerVQConfig, device: str, processes: int) -> Memory:
    """Of one phase: the moments of a step, and the largest."""
    train, streams = settings.train, settings.data.order == "streams"
    batch, passes = cut(train, processes)
    asked = not (train.compile or model.checkpoint_activations)  # as the language task asks for `task_share`
    probes = asked and any(q.kind != "none" for q in model.layer_quantizers())
    found = footprint.training(
        model,
        batch,
        train.seq_len,
        precision=train.precision,
        past=((train.updates_per_sequence or 2) - 1) * train.seq_len if streams else 0,
        retained=probes,
        device=device,
    )
    everything = sum(found.parameters) + found.outside
    buckets = everything if processes > 1 else 0  # DistributedDataParallel's copies
    earlier = everything if passes > 1 else 0  # gradients of the micro-batches before
    before = list(accumulate((part.kept for part in found.layers), initial=found.embedded))
    moments = [  # when, gradients, activations, working
        ("loss", earlier, before[-1], max(found.loss.forward, found.loss.backward)),
        ("update", everything, 0, _temporaries(train, model, everything, device)),
    ]
    for i, part in enumerate(found.layers):
        later = sum(found.parameters[i + 1 :]) + found.outside
        moments.append(("forward", earlier, before[i], part.forward))
        moments.append(("backward", max(earlier, later), before[i + 1], part.backward - part.kept))
    if probes:
        layers = zip(found.layers, found.parameters, strict=True)
        most = max(part.backward - part.kept - parameters for part, parameters in layers)
        moments.append(("probe", earlier, before[-1] + found.loss.kept, most + found.keys * len(found.layers)))
    when, gradients, activations, working = max(moments, key=lambda m: sum(m[1:]))
    return Memory(
        parameters=everything + found.buffers,
        optimizer=optimizer_bytes(model, train),
        state=found.state * (2 * passes - 1) if streams else 0,
        gradients=gradients + buckets,
        activations=activations,
        working=working,
        peak=when,
    )


def cut(train: OptimizationConfig, processes: int) -> tuple[int, int]:
    """Rows of a forward pass on one process, and how many passes make a step."""
    rows = -(-train.batch_size // processes)
    batch = min(train.micro_batch or rows, rows)
    return batch, -(-rows // batch)


def optimizer_bytes(model: TransformerVQConfig, train: OptimizationConfig) -> int:
    """What the optimizers of `optimizers.py` remember between steps."""
    with torch.device("meta"):
        module = TransformerVQ(model)
    hidden = hidden_matrices(module) if train.optimizer == "muon" else set()
    numbers = 0
    for name, p in module.named_parameters():
        if train.optimizer == "adafactor":
            factored = p.ndim >= 2 and min(p.shape[-2:]) >= 128
            numbers += p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if factored else p.numel()
        else:
            numbers += p.numel() * (1 if name in hidden else 2)
    return numbers * (8 if train.precision == "fp64" else 4)


def _temporaries(train: OptimizationConfig, model: TransformerVQConfig, parameters: int, device: str) -> int:
    """Of the optimizer's arithmetic: all parameters at once on a GPU, the largest alone on a CPU."""
    if device != "cpu":
        return parameters
    with torch.device("meta"):
        largest = max(p.numel() for p in TransformerVQ(model).parameters())
    return 2 * largest * (8 if train.precision == "fp64" else 4)


def available(device: str) -> int:
    """Bytes that there are: a GPU's whole memory; on a CPU what is free now, within a cgroup's limit."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    free: int = min(psutil.virtual_memory().available, _left_in_group())
    return free


def _left_in_group() -> float:
    """What a container may still take; inf where it has no limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text(encoding="utf-8").strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return float("inf")
    return float("inf") if limit == "max" else max(0, int(limit) - int(used))


def complaint(settings: RunConfig, device: str, processes: int = 1) -> str | None:
    """One line where the run takes more than there is; None where it fits or nobody can tell.

    Processes on one machine share what it has, but each has its GPU.  `model.vocab_size` must be set.
    """
    there = available(device)
    sharing = 1 if device == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if _roughly(settings, processes) * sharing * CLEARLY_FITS < there:
        return None
    try:
        needed = training_memory(settings, device, processes).total * sharing
    except Exception:  # a module of somebody's own that cannot run without numbers; the run itself will tell
        return None
    if needed <= there:
        return None
    what = "the GPU has" if device == "cuda" else "is free"
    return (
        f"a step takes about {gib(needed)} of memory, and {gib(there)} {what}: it may not fit; a smaller "
        "train.micro_batch or model.checkpoint_activations=true takes less, with the same result"
    )


def _roughly(settings: RunConfig, processes: int) -> int:
    """More than a step takes, most likely; at no cost."""
    model, train = settings.model, settings.train
    batch, passes = cut(train, processes)
    mlp = model.mlp_dim or 3 * model.width
    heads = model.heads * (model.key_dim + model.value_dim + model.window + 1)
    widths = 2 * model.width + heads + (mlp if model.block == "transformer" else 0)
    matrices = model.width * (2 * heads + 3 * mlp)
    full = any(getattr(q, "start_step", 0) or q.kind == "none" for q in model.layer_quantizers())
    seen = (train.updates_per_sequence or 2) * train.seq_len * model.heads if full else 0
    codes = max(getattr(q, "size", 0) for q in model.layer_quantizers())
    states = passes * batch * codes * (model.value_dim + 1) * model.key_value_heads
    vocabulary = model.vocab_size or 0
    per_token = model.layers * (8 * widths + 4 * seen) + 4 * min(vocabulary, 2**24 // (batch * train.seq_len) + 1)
    weights = 8 * (model.layers * matrices + 2 * model.width * vocabulary)
    return 8 * (batch * train.seq_len * per_token + weights + 4 * model.layers * states)


def gib(size: float) -> str:
    """Like `3.2 GiB` or `410 MiB`."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
