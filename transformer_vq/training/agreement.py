"""Processes of one run must have been started with the same config, flags, code and data: compared at the start."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import transformer_vq
from transformer_vq.config import ConfigError
from transformer_vq.config.load import difference
from transformer_vq.training.distributed import everyones

LONG = 4  # differences that are named of one process


def check_agreement(accelerator: Accelerator, facts: Mapping[str, Any]) -> None:
    """Compare nested plain values with those of the other processes; every process must call it.

    Raises ConfigError, the same on every process, which names the processes that differ from process 0, and in what.
    """
    found = everyones(facts, accelerator)
    differing: dict[str, list[int]] = {}
    for rank, theirs in enumerate(found):
        lines = difference(found[0], theirs)
        if lines:
            more = [f"{len(lines) - LONG} more"] if len(lines) > LONG else []
            differing.setdefault(", ".join([*lines[:LONG], *more]), []).append(rank)
    if differing:
        groups = [f"{_named(ranks)} by {lines}" for lines, ranks in differing.items()]
        raise ConfigError(f"processes were not started alike: from process 0 differ {'; '.join(groups)}")


def code() -> dict[str, str]:
    """What runs here: versions, and a hash over the package's source."""
    return {"version": transformer_vq.__version__, "source": _source(), "torch": torch.__version__}


@cache
def _source() -> str:
    folder, total = Path(transformer_vq.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]


def _named(ranks: list[int]) -> str:
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
