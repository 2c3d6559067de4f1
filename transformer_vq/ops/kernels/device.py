"""Where kernels can run, and on what. Imports no triton."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from importlib.util import find_spec
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Launches = TypeVar("Launches", bound=Callable[..., Any])
OLDEST = 80
"""sm_80: the first that bf16 products and the kernels' compiler know."""


def interpreted() -> bool:
    """Whether kernels run on the CPU: TRITON_INTERPRET=1 was set before triton came."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def installed() -> bool:
    """Whether there is a triton."""
    return find_spec("triton") is not None


def usable(device: torch.device) -> bool:
    """Whether kernels run on tensors there."""
    if device.type == "cuda":
        return installed() and architecture(device) >= OLDEST
    return installed() and device.type == "cpu" and interpreted()


_rehearsing = ContextVar("rehearsing", default=False)


@contextmanager
def rehearsal() -> Iterator[None]:
    """Memory is allocated in here and this thread launches no kernel: to count what launchers need."""
    token = _rehearsing.set(True)
    try:
        yield
    finally:
        _rehearsing.reset(token)


def launched(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """What launches a kernel over a grid, or does nothing."""
    return (lambda *_, **__: None) if _rehearsing.get() else kernel[grid]


def on_its_device(launches: Launches) -> Launches:
    """The same function, with the GPU of its first tensor argument as the current one: there Triton launches."""

    @wraps(launches)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(next(x for x in args if isinstance(x, Tensor))):
            return launches(*args, **kwargs)

    return cast(Launches, run)


def architecture(device: torch.device) -> int:
    """90 for sm_90; 0 without a GPU. Of tensors without numbers: the current GPU's."""
    if device.type not in ("cuda", "meta") or not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device if device.type == "cuda" else None)
    return 10 * major + minor
