"""Where kernels can run, and on what. Imports no triton."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch


def interpreted() -> bool:
    """Whether kernels run on the CPU: TRITON_INTERPRET=1 was set before triton came."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def installed() -> bool:
    """Whether there is a triton."""
    return find_spec("triton") is not None


def usable(device: torch.device) -> bool:
    """Whether kernels run on tensors there."""
    return installed() and (device.type == "cuda" or (device.type == "cpu" and interpreted()))


def architecture(device: torch.device) -> int:
    """90 for sm_90; 0 without a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
