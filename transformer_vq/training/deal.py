"""What is carried from step to step, dealt anew: from the processes that wrote a checkpoint to those that read it.

Every carried tensor has rows of the batch as its first axis, so it is taken apart by row and put together as the new
processes and micro-batches read the batch. Of processes that share rows the first holds what the rows go on from, and
all of them what is drawn for the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Carried = Mapping[str, Tensor]
"""By `SLOT.NAME`, as `Task.carried` gives it."""


class Layout(NamedTuple):
    """How a process reads the batch of a step."""

    slots: list[range]
    """The rows of each micro-batch."""
    context: int
    """How many neighbouring processes share them."""


def deal(held: Sequence[Carried], rows: Sequence[Sequence[range]], wanted: Sequence[range]) -> dict[str, Tensor]:
    """held, rows: of each writer that held whole rows, what it carried and which rows its slots were; wanted: the rows
    of the reader's slots -> what the reader carries.

    Raises ValueError where rows are missing, or do not fit together (states that grow with the text).
    """
    found: dict[str, Tensor] = {}
    places = [(writer, slot, part) for writer, slots in enumerate(rows) for slot, part in enumerate(slots)]
    for slot, part in enumerate(wanted):
        parts = [(writer, old, range(max(r.start, part.start), min(r.stop, part.stop)), r) for writer, old, r in places]
        parts = sorted((p for p in parts if len(p[2])), key=lambda p: p[2].start)
        if sum(len(p[2]) for p in parts) != len(part):
            raise ValueError(f"rows {part.start} to {part.stop - 1} of the batch are not all there")
        pieces = [
            {
                name.partition(".")[2]: tensor[both.start - r.start : both.stop - r.start]
                for name, tensor in held[writer].items()
                if name.startswith(f"{old}.")
            }
            for writer, old, both, r in parts
        ]
        if any(piece.keys() != pieces[0].keys() for piece in pieces):
            raise ValueError(f"rows {part.start} to {part.stop - 1} of the batch carry different things")
        for name in pieces[0]:
            tensors = [piece[name] for piece in pieces]
            if any(x.shape[1:] != tensors[0].shape[1:] for x in tensors):
                raise ValueError(f"{name} of rows {part.start} to {part.stop - 1} has several sizes")
            found[f"{slot}.{name}"] = torch.cat(tensors)
    return found
