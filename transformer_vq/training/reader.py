"""The batches of a run, read one step ahead: by a thread, and copied to the device, while the present step runs.

A batch is a pure function of its step, so nothing has to be remembered: a resumed run reads what it would have read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from transformer_vq.training.task import MicroBatch

Read = Callable[[int], list[MicroBatch]]


class Reader:
    """Reads step after step of `steps`. `seconds` and `units` say how long reading has taken, and how much it was."""

    def __init__(self, read: Read, steps: int, device: torch.device) -> None:
        """read: a step's micro-batches, on the device."""
        self.read, self.steps, self.device = read, steps, device
        self.seconds, self.units = 0.0, 0
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1, "reader")
        self.ahead: tuple[int, Future[list[MicroBatch]]] | None = None

    def take(self, step: int) -> list[MicroBatch]:
        """The batches of `step`; from now on those of the next are read.  Raises what reading them has raised."""
        at, coming = self.ahead or (None, None)
        if coming is None or at != step:
            coming = self.thread.submit(self._read, step)
        batches = coming.result()
        if self.copies is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self.copies)
            for tensor in tensors(batches):
                tensor.record_stream(now)  # its memory is the other stream's, which must not reuse it before
        self.ahead = (step + 1, self.thread.submit(self._read, step + 1)) if step + 1 < self.steps else None
        return batches

    def close(self) -> None:
        """Read no further."""
        self.thread.shutdown(wait=False, cancel_futures=True)

    def _read(self, step: int) -> list[MicroBatch]:
        began = time.perf_counter()
        with torch.cuda.stream(self.copies):  # None: as it is
            batches = self.read(step)
        self.seconds += time.perf_counter() - began
        self.units += sum(batch.units for batch in batches)
        return batches


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors on a GPU in nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        if tree.is_cuda:
            yield tree
    elif isinstance(tree, Mapping):
        yield from tensors(list(tree.values()))
    elif isinstance(tree, tuple | list):
        for part in tree:
            yield from tensors(part)
