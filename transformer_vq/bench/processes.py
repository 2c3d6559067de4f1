"""Work on several CPU processes of one thread each, started for it, joined by gloo without a port."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from transformer_vq.training.context import ProcessLine, make_line


def together(work: Callable[..., Any], processes: int, *arguments: Any) -> list[Any]:
    """What `work(line, *arguments)` returns on each process, as JSON has it. A function of a module, not a closure."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_process, (processes, folder, work, arguments), nprocs=processes)
        return [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]


def _process(rank: int, processes: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    try:
        line: ProcessLine | None = make_line(processes, torch.device("cpu"), processes, closes=False)
        found = work(line, *arguments)
        (Path(folder) / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()
