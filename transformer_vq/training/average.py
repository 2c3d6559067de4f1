"""The mean of the weights after each of a run's last steps: what is evaluated and kept at its end (`train.average`).

    w̄ ← w̄ + (w − w̄)/n        after the n-th step of the last share of the steps      [Izmailov 1803.05407]

Parameters are averaged, and with them what a quantizer learns by gradient: codes, SimVQ's map, FSQ's projections. In so
short a stretch they move with the keys that they stand for, so that the mean of the codes fits keys that the mean of
the weights makes. Buffers stay as they are: an EMA codebook is a running mean of keys already, over 1/(1−γ) steps, and
its sums and counts belong together. Training goes on from the weights themselves, never from their mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_swa_multi_avg_fn

UPDATE = get_swa_multi_avg_fn()


def first_averaged(steps: int, share: float | None) -> int:
    """Steps that are done before the first whose weights count: at least one counts; `steps` without a share."""
    return steps if share is None else steps - max(1, math.floor(steps * share + 1e-9))


class Average:
    """The mean of one module's parameters over steps, in their own type and on their device; empty at first."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.count = 0
        """Steps that the mean is of."""
        self.mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self) -> None:
        """Count the parameters as they are now."""
        now = {name: p.detach() for name, p in self.module.named_parameters()}
        if self.count:
            UPDATE(list(self.mean.values()), list(now.values()), self.count)
        else:
            self.mean = {name: p.clone() for name, p in now.items()}
        self.count += 1

    def load(self, mean: Mapping[str, Tensor], count: int) -> None:
        """Put back a mean over so many steps."""
        parameters = dict(self.module.named_parameters())
        self.mean = {name: mean[name].to(p.device, p.dtype, copy=True) for name, p in parameters.items()}
        self.count = count

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The module has the mean for its parameters in here, where there is one, and its own again after."""
        parameters = dict(self.module.named_parameters()) if self.count else {}
        own = {name: p.detach().clone() for name, p in parameters.items()}
        try:
            _write(parameters, self.mean)
            yield
        finally:
            _write(parameters, own)


class Averages:
    """Those of all modules of a run, which begin to count when `share` of its steps are left; none without a share."""

    def __init__(self, modules: Mapping[str, nn.Module], steps: int, share: float | None) -> None:
        self.first = first_averaged(steps, share)
        self.by_name = {} if share is None else {name: Average(module) for name, module in modules.items()}

    def after(self, done: int) -> None:
        """So many steps are done."""
        for average in self.by_name.values() if done > self.first else ():
            average.add()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Every module has its mean in here."""
        with ExitStack() as stack:
            for average in self.by_name.values():
                stack.enter_context(average.in_place())
            yield

    def report(self) -> dict[str, int]:
        """For the summary; nothing where nothing is averaged."""
        return {"averaged_steps": max(a.count for a in self.by_name.values())} if self.by_name else {}


@torch.no_grad()
def _write(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, p in parameters.items():
        p.copy_(values[name])
