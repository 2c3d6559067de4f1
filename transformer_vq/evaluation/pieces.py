"""A split's numbers piece by piece, so that two runs can be compared on the same documents: numpy only.

    RUN/pieces/SPLIT.npz    METRIC:total and METRIC:weight, (P) fp64 each; the metric of the split is Σ total / Σ weight

A piece is a document of a text that has enough of them, else a window of `train.seq_len` tokens; of a recall task, an
example. Written at the end of a run for what it was scored on.

Axes:  P pieces  N targets  B examples  T tokens of an example
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from transformer_vq.data import TokenFile
from transformer_vq.files import write, writing

FOLDER = "pieces"
FEWEST_DOCUMENTS = 20  # fewer say little about documents: then windows
MOST_TARGETS = 2**25  # of a longer text the losses are not kept: a quarter of a gigabyte

Floats = NDArray[np.float64]


class Piecewise(NamedTuple):
    """A metric that is a mean: what each piece adds to the sum, and how much it weighs."""

    total: Floats
    """(P)."""
    weight: Floats
    """(P): labels, bytes, questions."""


Pieces = dict[str, Piecewise]


def pieces_of_text(nats: Floats, split: TokenFile, window: int) -> Pieces:
    """loss, bits_per_token and, where the text is known, bits_per_byte of a split whose targets cost `nats` (N)."""
    starts = np.arange(0, len(nats), window)
    if len(split.documents) >= FEWEST_DOCUMENTS:
        starts = np.unique(np.maximum(split.documents - 1, 0))  # the first token of all is no target
        starts = starts[starts < len(nats)]
    total, tokens = np.add.reduceat(nats, starts), np.diff(starts, append=len(nats)).astype(np.float64)
    bits = total / math.log(2)
    found = {"loss": Piecewise(total, tokens), "bits_per_token": Piecewise(bits, tokens)}
    if split.bytes is not None:
        covered = np.add.reduceat(split.covered(1, len(split)), starts).astype(np.float64)
        found["bits_per_byte"] = Piecewise(bits, covered)
    return found


def pieces_of_rows(values: Mapping[str, tuple[NDArray[np.floating], NDArray[np.bool_]]]) -> Pieces:
    """By example; of each metric the values (B, T), and which of them count (B, T)."""
    return {
        name: Piecewise((x * counts).sum(1, dtype=np.float64), counts.sum(1).astype(np.float64))
        for name, (x, counts) in values.items()
    }


def write_pieces(run: Path, pieces: Mapping[str, Pieces]) -> None:
    """By split, into the run's folder.  Raises WriteError."""
    folder = run / FOLDER
    for split, found in pieces.items():
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        arrays = {f"{name}:{field}": x for name, metric in found.items() for field, x in metric._asdict().items()}
        write(folder / f"{split}.npz", partial(np.savez_compressed, allow_pickle=False, **arrays))


def read_pieces(run: Path, split: str) -> Pieces:
    """What a run kept of a split; {} where it kept nothing."""
    path = run / FOLDER / f"{split}.npz"
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as file:
        names = {key.rpartition(":")[0] for key in file.files}
        return {name: Piecewise(file[f"{name}:total"], file[f"{name}:weight"]) for name in sorted(names)}
