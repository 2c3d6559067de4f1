"""What a checkpoint holds: everything that the next step depends on, and nothing else.

PLAYER.safetensors, PLAYER-optimizer.safetensors   of each player; where its parameters are cut over processes PLAYER/
                                                   and PLAYER-optimizer/, with a file of each process
PLAYER-average.safetensors                         the mean of its weights so far, where some are averaged; at the end
                                                   that stands in PLAYER.safetensors, for whoever uses the model, and
PLAYER-training.safetensors                        the weights that training would go on from
carried-RANK.safetensors                           what a process carries from step to step, where it does
trainer.json                                       units and seconds so far, processes, over how many steps weights
                                                   are averaged, and the plan: how many steps were planned, and after
                                                   which a new warmup began (`restarts`)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from transformer_vq.config import ConfigError
from transformer_vq.config.run import OptimizationConfig
from transformer_vq.files import WriteError, in_units, read_text, write_text
from transformer_vq.training.average import Average
from transformer_vq.training.checkpoints import (
    TRAINER,
    Checkpoints,
    load_json,
    load_tensors,
    save_json,
    save_parts,
    save_tensors,
)
from transformer_vq.training.deal import Layout, deal
from transformer_vq.training.distributed import any_process, everyones, on_main, together
from transformer_vq.training.optimizers import Optimizers
from transformer_vq.training.sharding import is_sharded, load_cut
from transformer_vq.training.task import Task

PLANNED = "planned.json"  # beside a checkpoint that was written before plans were kept; not in its manifest


@dataclass
class Position:
    """How far a run is. `done` counts optimizer steps, `units` the tokens or images in them, `seconds` their time."""

    done: int = 0
    units: int = 0
    seconds: float = 0.0
    restarts: tuple[int, ...] = ()
    """Steps after which the schedule began anew (`train.extend: restart`), in order."""


def write_snapshot(
    checkpoints: Checkpoints,
    at: Position,
    planned: int,
    task: Task,
    optimizers: Mapping[str, Optimizers],
    accelerator: Accelerator,
    layout: Layout,
    averages: Mapping[str, Average],
) -> None:
    """Make a checkpoint of step `at.done`, unless there is one.  Raises WriteError, and leaves the others alone."""
    step, carried, count = at.done, task.carried(), accelerator.num_processes
    (carries,) = any_process([bool(carried)], accelerator)
    temporary = checkpoints.temporary(step)
    if on_main(accelerator, lambda: step == checkpoints.last()):
        return
    tensors: dict[str, Mapping[str, Tensor]] = {}
    parted: set[str] = set()
    for name, own in optimizers.items():
        tensors |= {name: task.players[name].module.state_dict(), f"{name}-optimizer": own.state()}
        tensors |= _averaged(name, tensors[name], averages.get(name), final=step == planned)
        parted |= {name, f"{name}-optimizer"} if is_sharded(task.players[name].module) else set()
    mine = carried if carries else {}
    rows = [[(r.start, r.stop) for r in slots] for slots in everyones(layout.slots, accelerator)]
    size = sum(everyones(_bytes(mine), accelerator)) + sum(map(_bytes, tensors.values()))

    def write() -> None:
        checkpoints.begin(step)
        for name in tensors.keys() - parted:
            save_tensors(tensors[name], temporary / f"{name}.safetensors")
        run = {"units": at.units, "seconds": at.seconds, "processes": count, "carries": carries}
        run |= {"averaged": {name: average.count for name, average in averages.items()}} if averages else {}
        cut = {"rows": rows, "context": layout.context} if carries else {}
        save_json({**run, **cut, "planned": planned, "restarts": at.restarts}, temporary / TRAINER)

    try:
        on_main(accelerator, write, long=True)
        for name in sorted(parted):
            together(accelerator, partial(save_parts, tensors[name], temporary / name))
        if carries:
            path = temporary / f"carried-{accelerator.process_index}.safetensors"
            together(accelerator, lambda: save_tensors(mine, path))
        on_main(accelerator, lambda: checkpoints.commit(step), long=True)
    except WriteError as error:
        on_main(accelerator, lambda: shutil.rmtree(temporary, ignore_errors=True))  # make room for whoever looks
        raise WriteError(f"{error}; the checkpoint of step {step} is {in_units(size)}") from error


def read_snapshot(
    checkpoint: Path,
    step: int,
    task: Task,
    optimizers: Mapping[str, Optimizers],
    train: OptimizationConfig,
    planned_before: int,
    accelerator: Accelerator,
    layout: Layout,
    averages: Mapping[str, Average],
) -> Position:
    """Put a checkpoint back into players, optimizers and task.

    planned_before: the run's own `train.steps` until now, for a checkpoint that does not say what was planned. A mean
    of weights is taken up where as many steps are planned now; else other steps are the last ones, and it begins anew.
    The checkpoint has been verified. Raises ConfigError when what it carries cannot be dealt to these processes.
    """
    values = load_json(checkpoint / TRAINER)
    carried = _carried(checkpoint, values, layout, accelerator) if values["carries"] else None
    for name, own in optimizers.items():
        module = task.players[name].module
        weights = load_tensors(checkpoint / f"{name}.safetensors", module.state_dict())
        kept, mean = checkpoint / f"{name}-training.safetensors", checkpoint / f"{name}-average.safetensors"
        if name in averages and train.steps == values.get("planned") and (kept.is_file() or mean.is_file()):
            averages[name].load(weights if kept.is_file() else load_tensors(mean), values["averaged"][name])
        if kept.is_file():
            weights |= load_tensors(kept)
        load_cut(module, weights) if is_sharded(module) else module.load_state_dict(weights)
        own.load(load_tensors(checkpoint / f"{name}-optimizer.safetensors", own.named))
    if carried is not None:
        task.restore(carried)
    planned = on_main(accelerator, lambda: _planned(checkpoint, values, planned_before, train))
    restarts = tuple(values.get("restarts", ()))
    if train.steps > planned and train.extend == "restart":
        restarts = (*restarts, planned)
    return Position(step, values["units"], values["seconds"], restarts)


def _averaged(
    name: str, state: Mapping[str, Tensor], average: Average | None, final: bool
) -> dict[str, Mapping[str, Tensor]]:
    """What a checkpoint holds for a mean of weights, by file: see the top. state: the player's own."""
    if average is None or not average.count:
        return {}
    if not final:
        return {f"{name}-average": average.mean}
    return {name: {**state, **average.mean}, f"{name}-training": {key: state[key] for key in average.mean}}


def _carried(
    checkpoint: Path, values: Mapping[str, Any], layout: Layout, accelerator: Accelerator
) -> Mapping[str, Tensor]:
    """What this process goes on from, of what those that wrote the checkpoint carried."""
    count, mine = accelerator.num_processes, accelerator.process_index
    written, rows, context = values["processes"], values.get("rows"), values.get("context", 1)

    def of(rank: int) -> dict[str, Tensor]:
        return load_tensors(checkpoint / f"carried-{rank}.safetensors")

    if rows is None:  # an old checkpoint
        if written != count or layout.context > 1:
            raise ConfigError(f"{checkpoint}: holds the state carried by {written} processes; resume with as many")
        return of(mine)
    slots = [[range(*ends) for ends in process] for process in rows]
    same = written == count and context == layout.context and slots == everyones(layout.slots, accelerator)
    if same:
        return of(mine)
    whole = range(0, written, context)
    try:
        return deal([of(rank) for rank in whole], [slots[rank] for rank in whole], layout.slots)
    except ValueError as error:
        raise ConfigError(f"{checkpoint}: cannot be dealt to {count} processes: {error}") from None


def read_imported(checkpoint: Path, task: Task) -> None:
    """Start the first player from a model that was trained elsewhere: weights alone, of step 0 (imported.py)."""
    name, player = next(iter(task.players.items()))
    player.module.load_state_dict(load_tensors(checkpoint / f"{name}.safetensors"))


def _planned(checkpoint: Path, values: Mapping[str, Any], before: int, train: OptimizationConfig) -> int:
    """The steps planned when the checkpoint was written. What an old one does not say is written beside it, before the
    run's config changes: after a kill in between it could not be known.
    """
    if "planned" in values:
        return int(values["planned"])
    path = checkpoint / PLANNED
    if path.is_file():
        return int(json.loads(read_text(path)))
    if train.steps != before:
        write_text(path, json.dumps(before))
    return before


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
