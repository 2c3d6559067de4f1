"""Processes of one run must have been started with the same config, flags, code and data: compared at the start.

What is refused before the processes have joined is told to all of them where they first compare, so that input which is
wrong on one machine alone is one line, too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator

import transformer_vq
from transformer_vq.config import ConfigError
from transformer_vq.config.load import difference
from transformer_vq.training.distributed import everyones, processes

LONG = 4  # differences that are named of one process


def check_agreement(accelerator: Accelerator, facts: Mapping[str, Any] | ConfigError) -> None:
    """Compare nested plain values with those of the other processes; every process must call it.

    facts: or the error with which this process ends.
    Raises ConfigError, the same on every process, which names the processes that differ from process 0, and in what;
    where some end with errors, those.
    """
    everything = everyones(facts, accelerator)
    refused: dict[str, list[int]] = {}
    for rank, error in enumerate(everything):
        if isinstance(error, ConfigError):
            refused.setdefault(str(error), []).append(rank)
    if refused:
        (text, ranks), *others = refused.items()
        alike = not others and len(ranks) == len(everything)
        raise ConfigError(text if alike else "; ".join(f"{_named(who)}: {what}" for what, who in refused.items()))
    found = [theirs for theirs in everything if not isinstance(theirs, ConfigError)]
    differing: dict[str, list[int]] = {}
    for rank, theirs in enumerate(found):
        lines = difference(found[0], theirs)
        if lines:
            more = [f"{len(lines) - LONG} more"] if len(lines) > LONG else []
            differing.setdefault(", ".join([*lines[:LONG], *more]), []).append(rank)
    if differing:
        groups = [f"{_named(ranks)} by {lines}" for lines, ranks in differing.items()]
        raise ConfigError(f"processes were not started alike: from process 0 differ {'; '.join(groups)}")


@contextmanager
def before_joining() -> Iterator[None]:
    """What is refused in here ends all processes that a launcher has started."""
    try:
        yield
    except ConfigError as error:
        refuse(error)


def refuse(error: ConfigError) -> NoReturn:
    """Join the other processes to tell them why this one does not train; nobody has joined yet, or waits for this one.

    Raises what all of them raise, see `check_agreement`; alone, `error`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with processes((), Path()) as accelerator:
            check_agreement(accelerator, error)
    raise error


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
