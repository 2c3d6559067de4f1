"""Memory of a training step that is run whole, on fake tensors: of tasks whose parts nobody needs to tell apart.

What is there at any moment: all players' parameters and optimizer states, gradients of the players whose turn is over
(each keeps its own until its next turn), and what the passes of the one whose turn it is need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transformer_vq.config.run import OptimizationConfig
from transformer_vq.ops.inside import inside
from transformer_vq.ops.live_bytes import counting, fill
from transformer_vq.training.memory import cut, optimizer_bytes, update_bytes


@dataclass(frozen=True)
class WholeStep:
    """Bytes of a training step on one process."""

    parameters: int
    """With codebooks and other buffers."""
    optimizer: int
    passes: int
    """The most of all forward and backward passes, gradients included."""
    update: int
    """The most while parameters move: all gradients, and the optimizer's temporaries."""

    @property
    def total(self) -> int:
        """At the peak."""
        return self.parameters + self.optimizer + max(self.passes, self.update)


def whole_step(
    players: Mapping[str, nn.Module],
    loss: Callable[[str, int], Tensor],
    train: OptimizationConfig,
    device: str,
    processes: int = 1,
    constant: nn.Module | None = None,
) -> WholeStep:
    """Of one of `processes` on a `device` (cpu, cuda).

    players: on the meta device, in the order of their turns; their tensors are replaced by fake ones. loss: of a player
    and so many rows, the scalar that it minimises. constant: a network that they look through.
    """
    rows, passes = cut(train, processes)
    dtype = torch.float64 if train.precision == "fp64" else torch.float32
    for module in players.values():
        module.to(dtype)  # it says which buffers have a type of their own
    with counting(inside(device)) as live:
        for module in (*players.values(), *([] if constant is None else [constant])):
            fill(module)
        parameters = live.now
        for module in players.values():
            for p in module.parameters():  # as the last step left them
                p.grad = torch.empty_like(p) if p.requires_grad else None
        gradients = live.now - parameters
        live.peak = live.now
        for name, module in players.items():
            if passes == 1:
                module.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=train.precision == "bf16"):
                total = loss(name, rows)
            total.backward()
            del total
        peak = live.peak - parameters
    updates = [update_bytes(module, train, device) for module in players.values()]
    return WholeStep(
        parameters=parameters,
        optimizer=sum(optimizer_bytes(module, train) for module in players.values()),
        passes=peak + (gradients if processes > 1 else 0),  # DistributedDataParallel's copies
        update=gradients + max(updates),
    )
