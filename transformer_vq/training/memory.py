"""How much memory a run takes on one process, and whether the device has it.

Here for language models, whose parts come from the model itself (`models/footprint.py`) and are put together as a step
goes; `whole_step.py` runs what else is trained as it is. At any moment parameters, optimizer state, carried state and
the gradients made so far are there, and beside them

    forward     what the layers so far keep, and the most that the next one needs
    loss        what all layers keep, and the most that norm, head and loss need
    probe       what all keep, and one backward pass that keeps it; in the steps whose record holds `task_share`
    backward    what the layers left keep, and the most that this one needs
    update      all gradients, and the optimizer's temporaries

The peak is the largest. Python, PyTorch and its libraries take some 0.4 GiB more, and an allocator rounds up.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

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


def training_memory(settings: RunConfig, device: str, processes: int = 1, *, probes: bool = True) -> Memory:
    """Of a language model on one of `processes` on a `device` (cpu, cuda).  `model.vocab_size` must be set.

    probes: some steps measure `task_share`, as those of the language task do.
    """
    phases = (_peak(settings, model, device, processes, probes) for model in _phases(settings.model))
    return max(phases, key=lambda m: m.total)


def _phases(model: TransformerVQConfig) -> list[TransformerVQConfig]:
    """The model as it is in the end, and with unquantized keys where quantizers start late."""
    late = [i for i, q in enumerate(model.layer_quantizers()) if getattr(q, "start_step", 0)]
    if not late:
        return [model]
    whole = model.resolved()
    warming = {**(whole.per_layer or {}), **{str(i): {"kind": "none"} for i in late}}
    return [model, whole.model_copy(update={"per_layer": warming})]


def _peak(settings: RunConfig, model: TransformerVQConfig, device: str, processes: int, probes: bool) -> Memory:
    """Of one phase: the moments of a step, and the largest."""
    train, streams = settings.train, settings.data.order == "streams"
    batch, passes = cut(train, processes)
    asked = not (train.compile or model.checkpoint_activations)  # as the language task asks for `task_share`
    probes = probes and asked and any(q.kind != "none" for q in model.layer_quantizers())
    found = footprint.training(
        model,
        batch,
        train.seq_len,
        precision=train.precision,
        past=((train.updates_per_sequence or 2) - 1) * train.seq_len if streams else 0,
        retained=probes,
        device=device,
    )
    with torch.device("meta"):
        module = TransformerVQ(model)
    everything = sum(found.parameters) + found.outside
    buckets = everything if processes > 1 else 0  # DistributedDataParallel's copies
    earlier = everything if passes > 1 else 0  # gradients of the micro-batches before
    before = list(accumulate((part.kept for part in found.layers), initial=found.embedded))
    moments = [  # when, gradients, activations, working
        ("loss", earlier, before[-1], max(found.loss.forward, found.loss.backward)),
        ("update", everything, 0, update_bytes(module, train, device)),
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
        optimizer=optimizer_bytes(module, train),
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


def optimizer_bytes(module: nn.Module, train: OptimizationConfig) -> int:
    """What the optimizers of `optimizers.py` remember of a module between steps."""
    hidden = hidden_matrices(module) if train.optimizer == "muon" else set()
    numbers = 0
    for name, p in module.named_parameters():
        if train.optimizer == "adafactor":
            factored = p.ndim >= 2 and min(p.shape[-2:]) >= 128
            numbers += p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if factored else p.numel()
        else:
            numbers += p.numel() * (1 if name in hidden else 2)
    return numbers * (8 if train.precision == "fp64" else 4)


def update_bytes(module: nn.Module, train: OptimizationConfig, device: str) -> int:
    """Of the optimizers' arithmetic: all parameters at once on a GPU, the largest alone on a CPU."""
    sizes = [p.numel() for p in module.parameters()]
    return (sum(sizes) if device != "cpu" else 2 * max(sizes)) * (8 if train.precision == "fp64" else 4)


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

    `model.vocab_size` must be set.
    """
    needed = needed_where_close(
        roughly(settings, processes), lambda: training_memory(settings, device, processes).total, device, processes
    )
    advice = "a smaller train.micro_batch or model.checkpoint_activations=true takes less, with the same result"
    return warning("a step", needed, device, advice)


def needed_where_close(rough: int, exactly: Callable[[], int], device: str, processes: int) -> int:
    """Bytes of all processes that share what there is; 0 where that is clearly enough, or nobody can tell.

    rough, exactly: of one process. Processes on one machine share what it has, but each has its GPU.
    """
    sharing = 1 if device == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if rough * sharing * CLEARLY_FITS < available(device):
        return 0
    try:
        return exactly() * sharing
    except Exception:  # a module of somebody's own that cannot run without numbers; the run itself will tell
        return 0


def warning(what: str, needed: int, device: str, advice: str) -> str | None:
    """One line where more bytes are needed than there are, or None. advice: what takes less."""
    there = available(device)
    if needed <= there:
        return None
    has = "the GPU has" if device == "cuda" else "is free"
    return f"{what} takes about {gib(needed)} of memory, and {gib(there)} {has}: it may not fit; {advice}"


def roughly(settings: RunConfig, processes: int) -> int:
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
