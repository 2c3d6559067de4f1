"""What a run's summary says of the model's size, and of where the numbers come from."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from transformer_vq import __version__
from transformer_vq.training.distributed import everyones
from transformer_vq.training.sharding import local


def sizes(modules: Iterable[nn.Module], accelerator: Accelerator) -> dict[str, int]:
    """Parameters, and the most that one process holds of them; every process must call it."""
    parameters = [p for module in modules for p in module.parameters()]
    held = everyones(sum(local(p).numel() for p in parameters), accelerator)
    return {"parameters": sum(p.numel() for p in parameters), "parameters_per_process": max(held)}


def made_on(accelerator: Accelerator) -> dict[str, Any]:
    """Device, processes and versions."""
    return {
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "versions": {
            "transformer_vq": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def device_name(device: torch.device) -> str:
    """Like `cuda (NVIDIA H100)` or `cpu (2 threads)`."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({torch.get_num_threads()} threads)"
