"""Checkpoints by name, `RUN[@best|@last|@STEP]`, and runs that start from the weights of another."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from transformer_vq.config import ConfigError
from transformer_vq.training.checkpoints import load_tensors, verify
from transformer_vq.training.distributed import on_main
from transformer_vq.training.run_folder import RunFolder
from transformer_vq.training.task import Task


def find_checkpoint(origin: str) -> Path:
    """The folder of `RUN[@best|@last|@STEP]`; a RUN alone means its last.  Raises ConfigError naming what there is."""
    run, _, which = (origin, "", "last") if Path(origin).is_dir() or "@" not in origin else origin.rpartition("@")
    if not Path(run).is_dir():
        raise ConfigError(f"{origin}: there is no run folder {run}")
    return RunFolder(run).checkpoints.resolve(which)


def warm_start(task: Task, origin: str, accelerator: Accelerator) -> dict[str, str]:
    """Weights of another run for the first player; a line for the first screen."""
    try:
        checkpoint = find_checkpoint(origin)
    except ConfigError as error:
        raise ConfigError(f"train.init_from = {error}") from None
    on_main(accelerator, lambda: verify(checkpoint))
    first = next(iter(task.players))
    notes = task.warm_start(load_tensors(checkpoint / f"{first}.safetensors"), checkpoint.parents[1])
    return {"starts from": f"{checkpoint}; {'; '.join(notes)}"}
