"""Bytes of the tensors that are alive, counted while code runs on fake tensors: sizes without numbers, at no cost.

What PyTorch's own kernels take inside (packed matrices, scratch) and what an allocator rounds up to is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Inside = Callable[..., int]
"""Arguments of an opaque op -> bytes that it needs inside, beside its arguments and its result."""


class LiveBytes(TorchDispatchMode):
    """Counts storages made inside the `with` block until they die. What was made before it does not count."""

    def __init__(self, inside: dict[Any, Inside] | None = None) -> None:
        """inside: by opaque op, such as `torch.ops.transformer_vq.attend.default`."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self.inside = inside or {}
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and count what it made."""
        for x in tree_iter((args, kwargs)):  # what came from outside is not ours
            if isinstance(x, Tensor) and x.untyped_storage() not in self._known:
                self._known[x.untyped_storage()] = 0
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage())
        more = self.inside[func](*args, **(kwargs or {})) if func in self.inside else 0
        self.peak = max(self.peak, self.now + more)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        weakref.finalize(storage, self._freed, size).atexit = False

    def _freed(self, size: int) -> None:
        self.now -= size


@contextmanager
def counting(inside: dict[Any, Inside] | None = None) -> Iterator[LiveBytes]:
    """Fake tensors from here on, on the device that they are said to be on, and their bytes counted."""
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes(inside) as live:
        yield live


def fill(module: nn.Module) -> None:
    """Put fake tensors in place of a module's parameters and buffers, of their types.  Call inside of `counting`."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = torch.empty(b.shape, dtype=b.dtype)
