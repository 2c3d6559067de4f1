"""Parameters, gradients and optimizer states cut over processes: FSDP2, and the little that the loop asks of it.

    none    every process holds everything, DDP adds gradients up
    full    parameters are cut over all processes, gathered a layer at a time where they are used  [Zhao 2304.11277]
    hybrid  cut over the processes of each machine, the same on every machine

Codebooks and their statistics are buffers: whole and equal on every process, moved by us, as without. Parameters are
gathered and gradients added in the parameters' own type and autocast stays what it is, so that `precision: bf16` means
the same. The mesh has Accelerate's names of dimensions; `shard_model` is used as it is on GPUs and on CPUs, where
Accelerate's own plug-in would quietly become DDP.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from transformer_vq.config import ConfigError, TransformerVQConfig
from transformer_vq.config.run import OptimizationConfig

WHOLE_UPDATES = ("muon", "adafactor")
"""Optimizers whose update looks at a matrix as a whole."""


def check_sharding(train: OptimizationConfig, shard: str, processes: int, context: int = 1) -> None:
    """Raises ConfigError for what cannot be cut over so many processes, `context` of which share a row."""
    if shard == "none" or processes == 1:
        return
    if train.optimizer in WHOLE_UPDATES:
        raise ConfigError(
            f"train.optimizer = {train.optimizer}: looks at whole matrices, which train.shard = {shard} cuts up; "
            "train.optimizer = adamw, or train.shard = none"
        )
    if train.micro_batch == 1 and train.batch_size % (processes // context):
        raise ConfigError(
            f"train.micro_batch = 1: with train.shard = {shard} all processes make as many forward passes, and "
            f"{processes // context} do not share train.batch_size = {train.batch_size} evenly; leave micro_batch out"
        )


def check_scalars(model: TransformerVQConfig, shard: str, processes: int) -> None:
    """Raises ConfigError for a model with a parameter without axes, which FSDP2 does not take."""
    if shard != "none" and processes > 1 and model.absolute_positions:
        raise ConfigError(
            f"model.absolute_positions = true: their scale is one number, which train.shard = {shard} does not cut; "
            "train.shard = none"
        )


def make_mesh(shard: str, device: torch.device, processes: int) -> DeviceMesh:
    """The processes as `shard` groups them; those of a machine are the launcher's LOCAL_WORLD_SIZE.

    Raises ConfigError where machines have different numbers of them.
    """
    if shard == "full":
        return init_device_mesh(device.type, (processes,), mesh_dim_names=("dp_shard",))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if processes % local:
        raise ConfigError(f"train.shard = hybrid: {processes} processes are no whole number of machines with {local}")
    return init_device_mesh(device.type, (processes // local, local), mesh_dim_names=("dp_replicate", "dp_shard"))


def shard_model(module: nn.Module, mesh: DeviceMesh) -> None:
    """Cut the parameters of every layer, then of what is left, over `mesh`, in place.

    A layer is a member of a `ModuleList`. Gradients become means over all processes, as under DDP.
    """
    for inner in module.modules():
        if isinstance(inner, nn.ModuleList):
            for layer in inner:
                fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard_model` was called on it."""
    return isinstance(module, FSDPModule)


@contextmanager
def gradients_kept(module: nn.Module) -> Iterator[None]:
    """A backward pass in here adds to this process's gradients; they are shared in the next one outside."""
    root = cast(FSDPModule, module)
    root.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        root.set_requires_gradient_sync(True)


def let_go(module: nn.Module) -> None:
    """Cut up again what a forward pass that was broken off has left whole."""
    for part in _parts(module):
        part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor that the processes' parts make together; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_like(value: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a whole `value`, cut as `like` is, on its device, a copy; one that is cut already is
    given back.
    """
    if isinstance(value, DTensor):
        return value
    if isinstance(like, DTensor) and value.shape == like.shape:
        on_device = value.to(like.device)
        return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)
    return value.to(like.device, copy=True)


def load_cut(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of tensors that every process has read whole, or of its own parts."""
    whole = not any(isinstance(x, DTensor) for x in state.values())
    set_model_state_dict(module, dict(state), options=StateDictOptions(full_state_dict=whole))


@contextmanager
def views_may_leave_layers() -> Iterator[None]:
    """FSDP warns that a layer returned a view, which an operation in place would detach from it; we have none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)
        yield


def _parts(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]
