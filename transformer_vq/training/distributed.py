"""Processes: one `Accelerator` a run, opened and closed here, and the few things that processes do together.

On a CPU, `Accelerator()` under torchrun makes N independent runs, and `accelerate launch --cpu --num_processes N`
starts one process; neither says so. Hence `cpu=` and the comparison with what the launcher was asked for.
"""

from __future__ import annotations

import atexit
import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count, pairwise
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from transformer_vq.clock import spent
from transformer_vq.config import ConfigError
from transformer_vq.evaluation.crew import Crew
from transformer_vq.training.context import ProcessLine

T = TypeVar("T")

FOR_EVER = timedelta(days=365)
LOOK = 0.05  # seconds between two looks whether the main process is done with what may take hours


class ProcessesDiffer(RuntimeError):
    """Something that must be the same on all processes is not."""


@contextmanager
def processes(trackers: Sequence[str], folder: Path, timeout: float | None = 600.0) -> Iterator[Accelerator]:
    """An `Accelerator` for one run. Nothing but the launcher's process group is left behind, for the next run to use.

    timeout: seconds after which `watch.py` ends a run; an exchange gives up at the latest a little after that.
    Raises ConfigError when there are not as many processes as the launcher was asked for, or they do not find together.
    """
    had_group, had_state = dist.is_initialized(), PartialState._shared_state != {}
    asked = asked_for()
    patience = FOR_EVER if timeout is None else timedelta(seconds=2 * timeout + 60)
    try:
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",  # autocast is the loop's: Accelerate's casts every output, nested states too, to fp32
            log_with=list(trackers) or None,
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "trackers")),
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=patience),
                DistributedDataParallelKwargs(broadcast_buffers=False),
            ],
        )
    except dist.DistError as error:
        if not had_state:
            AcceleratorState._reset_state(reset_partial_state=True)
        raise ConfigError(_not_together(error)) from None
    try:
        if accelerator.num_processes != asked:
            raise ConfigError(
                f"the launcher was asked for {asked} processes and this run has {accelerator.num_processes}; "
                f"on a CPU use torchrun --nproc-per-node {asked} -m transformer_vq ..."
            )
        yield accelerator
    finally:
        if dist.is_initialized() and not had_group:
            atexit.register(_leave_group)  # not now: the next run needs it, a second rendezvous would hang
        if not had_state:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def _not_together(error: dist.DistError) -> str:
    host, port = (os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if "EADDRINUSE" in str(error):
        return f"MASTER_PORT = {port}: something else on this machine listens there; choose another port"
    reason = str(error).partition("\n")[0]
    return f"MASTER_ADDR = {host}, MASTER_PORT = {port}: the processes do not find together there: {reason}"


def _leave_group() -> None:
    gc.collect()  # DDP's reducers sit in cycles and hold the group, whose threads must not outlive the interpreter
    if dist.is_initialized():
        dist.destroy_process_group()


def share_gradients(module: nn.Module, accelerator: Accelerator, partly_used: bool, timed: bool) -> nn.Module:
    """The module as DDP wraps it (alone: as it is). Buffers stay each process's own: codebooks are kept equal by us.

    timed: see `gradients_waited`. On a GPU each forward pass then waits for the backward pass before it.
    """
    if accelerator.ddp_handler is not None:
        accelerator.ddp_handler.find_unused_parameters = partly_used
    with warnings.catch_warnings():  # torch 2.13 renames the argument, Accelerate knows the old name only
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        prepared: nn.Module = accelerator.prepare_model(module)
    if timed and isinstance(prepared, DistributedDataParallel):
        prepared._set_ddp_runtime_logging_sample_rate(1)
    return prepared


def gradients_waited(module: nn.Module) -> float:
    """Seconds that DDP's sums of gradients took beyond the backward pass that they overlap, by its own clock, in the
    step before this one; 0 where there is no DDP, or it is not timed.
    """
    if not isinstance(module, DistributedDataParallel):
        return 0.0
    found = module._get_ddp_logging_data()
    took, hidden = (found.get(f"backward_{what}_time", 0) for what in ("comm", "compute_comm_overlap"))
    return float(max(0, took - hidden)) / 1e9


def asked_for() -> int:
    """How many processes the launcher was asked for: `WORLD_SIZE`, or what an `accelerate launch` above us was told."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    parent = psutil.Process().parent()
    try:
        command = parent.cmdline() if parent is not None and "ACCELERATE_MIXED_PRECISION" in os.environ else []
    except psutil.AccessDenied:
        command = []
    words = [part for word in command for part in word.split("=", 1)]
    for option, value in pairwise(words):
        if option in ("--num_processes", "--num-processes"):
            return int(value)
    return 1


def on_main(accelerator: Accelerator, do: Callable[[], T], long: bool = False) -> T:
    """Do it on the main process alone; every process gets the result, or the exception.

    long: it may take longer than an exchange may. The others look now and then whether it is done, for as long as the
    main process lives.
    """
    if accelerator.num_processes == 1:
        return do()
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = do()
        except BaseException as error:  # the others must hear of it, whatever it is, or they wait in vain
            outcome[1] = error
    with spent("communication"):
        if long:
            _wait_for_main(accelerator)
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    value: T = outcome[0]
    return value


_long = count()


def _wait_for_main(accelerator: Accelerator) -> None:
    store, key = dist.distributed_c10d._get_default_store(), f"transformer_vq/done/{next(_long)}"
    if accelerator.is_main_process:
        store.set(key, "")
    else:
        while not store.check([key]):
            time.sleep(LOOK)


def crew(accelerator: Accelerator, in_step: bool) -> Crew:
    """The processes, as an evaluation sees them."""
    size = accelerator.num_processes
    lines = {n: ProcessLine(None, closes=True, size=n) for n in range(2, size + 1)}
    return Crew(accelerator.process_index, size, str(accelerator.device), in_step, lines)


def sum_over_processes(values: Tensor, accelerator: Accelerator) -> Tensor:
    """Elementwise sum, in place; the order of summation is the same on every process."""
    if accelerator.num_processes > 1:
        with spent("communication"):
            dist.all_reduce(values)
    return values


def any_process(flags: Sequence[bool], accelerator: Accelerator) -> list[bool]:
    """For each flag whether it is up on some process; the same answer on all."""
    count = torch.tensor([int(flag) for flag in flags], device=accelerator.device)
    return [n > 0 for n in sum_over_processes(count, accelerator).tolist()]


def together(accelerator: Accelerator, do: Callable[[], object]) -> None:
    """Do it on every process; where one fails, all raise what the first of those did."""
    error: Exception | None = None
    try:
        do()
    except Exception as caught:
        error = caught
    for found in everyones(error, accelerator):
        if found is not None:
            raise found


def everyones(value: T, accelerator: Accelerator) -> list[T]:
    """Each process's value, in the order of the processes."""
    if accelerator.num_processes == 1:
        return [value]
    values: list[Any] = [None] * accelerator.num_processes
    with spent("communication"):
        dist.all_gather_object(values, value)
    return values


def compare_replicas(module: nn.Module, accelerator: Accelerator) -> None:
    """Compare the bits of whole parameters and buffers, as codebooks are, across processes.  Raises ProcessesDiffer.

    No gradient keeps an EMA codebook together; what drifts apart once would go unnoticed.
    """
    if accelerator.num_processes == 1:
        return
    tensors = {name: tensor for name, tensor in module.state_dict().items() if not isinstance(tensor, DTensor)}
    mine = torch.stack([checksum(tensor) for tensor in tensors.values()])
    everyone = [torch.empty_like(mine) for _ in range(accelerator.num_processes)]
    with spent("communication"):
        dist.all_gather(everyone, mine)
    for rank, other in enumerate(everyone):
        if not torch.equal(other, everyone[0]):
            name = list(tensors)[int((other != everyone[0]).nonzero()[0])]
            raise ProcessesDiffer(
                f"{name} on process {rank} is not what it is on process 0: replicas have drifted apart"
            )


def checksum(tensor: Tensor) -> Tensor:
    """Sum of the bit patterns as integers, () int64: read once, on the device; any one changed bit changes it."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().reshape(-1).view(integers).sum(dtype=torch.int64)
