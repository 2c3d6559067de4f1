"""Opening a trained run by its name on the command line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from transformer_vq.cli.console import Failure

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from transformer_vq.training import LoadedRun


def open_run(run: str, device: torch.device | None = None) -> LoadedRun:
    """The model of `RUN[@best|@last|@STEP]` on the device, or a GPU if there is one.  Raises ConfigError, Failure."""
    import torch

    from transformer_vq.training import CheckpointError, load_run

    with one_line_for(CheckpointError):
        return load_run(run, device or ("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def launched(run: str) -> Iterator[Accelerator]:
    """The processes that a launcher has started for this command, or this one alone; nothing is written.

    Raises ConfigError.
    """
    from transformer_vq.training.distributed import processes

    with processes((), folder_of(run)) as accelerator:
        yield accelerator


def folder_of(run: str) -> Path:
    """The folder in `RUN[@best|@last|@STEP]`."""
    return Path(run if Path(run).is_dir() or "@" not in run else run.rpartition("@")[0])


@contextmanager
def told_to_all(joins: bool) -> Iterator[None]:
    """Input that is refused in here ends all processes of a launcher with the one line of the first; `joins`: if the
    others are about to join, and else wait for this one in vain.
    """
    from transformer_vq.config import ConfigError

    try:
        yield
    except ConfigError as error:
        if not joins or os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        from transformer_vq.training.agreement import refuse

        refuse(error)


@contextmanager
def one_line_for(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds are expected: their text is all that the user needs."""
    try:
        yield
    except kinds as error:
        raise Failure(str(error)) from error
