"""Started by `torchrun`: train every run config of a JSON file.

What the processes hand to each other in a step, and what each keeps after it, goes into `traffic-RANK.json` of the run.
LOCAL: how many processes a machine has, as far as `hybrid` is told.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from transformer_vq.config import RunConfig, validate
from transformer_vq.training import run
from transformer_vq.training.sharding import local
from transformer_vq.training.step import Stepper

HANDED = {"allreduce_": 0, "_allgather_base_": 0, "_reduce_scatter_base_": 1}  # which argument is the whole
STEP = 1  # counted from 0: neither the first nor the last, whose records take a second backward pass


class Traffic(TorchDispatchMode):
    """Bytes of the tensors in every collective, by its name and the type of its numbers; of gathers the whole ones."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        if operation.namespace == "c10d":
            name = operation._schema.name.removeprefix("c10d::")
            whole = arguments[HANDED[name]] if name in HANDED else arguments[0]
            for tensor in whole if isinstance(whole, list | tuple) else [whole]:
                key = f"{name} {str(tensor.dtype).removeprefix('torch.')}"
                self.bytes[key] = self.bytes.get(key, 0) + tensor.nbytes
        return operation(*arguments, **(named or {}))


make = Stepper.__call__


def counted(self, step):
    if step != STEP:
        return make(self, step)
    with Traffic() as traffic:
        made = make(self, step)
    (player,) = self.task.players.values()
    parameters = list(player.module.parameters())
    held = {
        "weights": [local(p) for p in parameters],
        "gradients": [local(p.grad) for p in parameters],
        "optimizer": [local(t) for t in self.optimizers["model"].state().values() if t.ndim],
        "codebooks": list(player.module.buffers()),
    }
    found = {"sent": traffic.bytes, **{name: sum(t.nbytes for t in tensors) for name, tensors in held.items()}}
    path = Path(self.task.config.run_dir, f"traffic-{os.environ['RANK']}.json")
    path.write_text(json.dumps(found), encoding="utf-8")
    return made


if __name__ == "__main__":
    Stepper.__call__ = counted
    os.environ["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL", os.environ["LOCAL_WORLD_SIZE"])
    with open(sys.argv[1], encoding="utf-8") as file:
        for tree in json.load(file):
            run(validate(tree, RunConfig), quiet=True)
    torch.distributed.barrier()
