"""One optimizer step, for each of the task's players in turn.

    micro-batches   forward and backward; a loss term weighs its share of the count over the whole step, all processes
    check           loss terms and gradient norm are finite, or NotFinite is raised before anything has moved
    update          clip, decay, step at `learning_rate(step)`; then the task applies its codebook statistics

Noise and dropout follow from (seed, step, row of the batch), however rows are spread. Torch's global generators, for
modules of others, are seeded from (seed, step, process, micro-batch). So a resumed run repeats everything bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from transformer_vq.clock import count, spent
from transformer_vq.config.run import OptimizationConfig
from transformer_vq.quantizers import Quantizer
from transformer_vq.quantizers.scheduled import Gathered, ScheduledQuantizer
from transformer_vq.training.deal import Layout
from transformer_vq.training.distributed import everyones, gradients_waited, share_gradients, sum_over_processes
from transformer_vq.training.optimizers import Optimizers
from transformer_vq.training.reader import Reader
from transformer_vq.training.schedule import learning_rate
from transformer_vq.training.sharding import (
    gradients_kept,
    is_sharded,
    let_go,
    make_mesh,
    shard_model,
    views_may_leave_layers,
    whole,
)
from transformer_vq.training.task import Losses, MicroBatch, Task


class NotFinite(ArithmeticError):
    """The loss or a gradient is NaN or infinite; nothing has been updated by it."""


class StepAbandoned(Exception):
    """A signal came between two micro-batches; nothing has been updated, and the task stands before the step."""


class Stepper:
    """The players' modules and optimizers on this process, and the step.

    restarts: see `learning_rate`. shard: see `sharding`. context: neighbouring processes that share rows.
    hurry: looked at between micro-batches of a run on one process.
    """

    def __init__(
        self,
        task: Task,
        train: OptimizationConfig,
        seed: int,
        accelerator: Accelerator,
        shard: str = "none",
        hurry: Callable[[], bool] = lambda: False,
        context: int = 1,
    ) -> None:
        self.task, self.train, self.seed, self.accelerator = task, train, seed, accelerator
        self.restarts: tuple[int, ...] = ()
        self.hurry = hurry
        processes = accelerator.num_processes
        self.sharded = shard != "none" and processes > 1
        self.context = context
        rank, rows_over = accelerator.process_index // context, processes // context
        self.slices = micro_batches(train, rank, rows_over, even=self.sharded)
        self.layout = Layout(self.slices, context)
        self.gradients_timed = not self.sharded and (accelerator.device.type == "cpu" or len(self.slices) == 1)
        self.reader = Reader(self._read, train.steps, accelerator.device)
        self.optimizers: dict[str, Optimizers] = {}
        self.modules: dict[str, nn.Module] = {}
        dtype = torch.float64 if train.precision == "fp64" else None
        mesh = make_mesh(shard, accelerator.device, processes) if self.sharded else None
        for name, player in task.players.items():
            player.module.to(device=accelerator.device, dtype=dtype)
            if mesh is not None:
                shard_model(player.module, mesh)
            self.optimizers[name] = Optimizers(player.module, player.train)

    def wrap(self) -> None:
        """Compile and, where nothing is cut up, hand to DDP, once the weights are what training starts from."""
        for name, player in self.task.players.items():
            if self.train.compile:
                self.task.compile(name)
            self.modules[name] = (
                player.module
                if self.sharded
                else share_gradients(player.module, self.accelerator, player.partly_used, self.gradients_timed)
            )

    def __call__(self, step: int) -> tuple[dict[str, float], int]:
        """Make optimizer step `step`, counted from 0: its record, and the units read by all processes.

        Raises NotFinite naming the rows of the batch, and StepAbandoned.
        """
        task = self.task
        task.set_step(step)
        for player in task.players.values():
            player.module.train()
        with spent("data"):
            batches = self.reader.take(step)
        names = sorted(batches[0].counts)
        mine = [sum(b.counts[name] for b in batches) for name in names]
        totals = torch.tensor([*mine, sum(b.units for b in batches)], device=self.accelerator.device)
        *counts, units = sum_over_processes(totals, self.accelerator).tolist()
        self._first_codebooks(step, batches)
        record: dict[str, float] = {}
        for turn, name in enumerate(task.players):
            values = self._turn(turn, name, step, batches, dict(zip(names, counts, strict=True)))
            record |= values if turn == 0 else {f"{name}/{key}": value for key, value in values.items()}
            count("gradients", gradients_waited(self.modules[name]))
        return record, units

    def _read(self, step: int) -> list[MicroBatch]:
        return [self.task.batch(step, rows, slot) for slot, rows in enumerate(self.slices)]

    def _turn(
        self, turn: int, name: str, step: int, batches: Sequence[MicroBatch], counts: Mapping[str, int]
    ) -> dict[str, float]:
        """A player's part of the step: its record, empty when it sits out."""
        optimizers = self.optimizers[name]
        optimizers.zero_grad()
        outputs: list[Losses] = []
        for batch in batches:
            self._begin_forward(step, batch, turn)
            synchronise = batch.slot == len(batches) - 1
            with nullcontext() if synchronise else self._apart(self.modules[name]):
                with spent("passes"):
                    losses = self._forward(name, batch)
                if not losses.terms:
                    return {}
                terms = {key: term * (batch.counts[key] / max(counts[key], 1)) for key, term in losses.terms.items()}
                total = torch.stack(list(terms.values())).sum() * self.accelerator.num_processes  # backward averages
                with spent("backward" if synchronise else "passes"):
                    self.accelerator.backward(total)
            outputs.append(Losses({key: term.detach() for key, term in terms.items()}, losses.metrics))
            if turn == 0 and not synchronise and self.accelerator.num_processes == 1 and self.hurry():
                self.task.abandon()
                raise StepAbandoned
        norm = whole(optimizers.gradient_norm())
        summed, metrics = self._gather(outputs)
        loss, size = sum(summed.values()), norm.item()
        if not (math.isfinite(loss) and math.isfinite(size)):
            raise NotFinite(f"{name} has loss {loss:.4g} and gradient norm {size:.4g} in {self._where(step, outputs)}")
        rate = learning_rate(step, self.task.players[name].train, self.restarts)
        with spent("update"):
            optimizers.step(rate, norm)
            self.task.after_update(name)
        return {"loss": loss, **self.task.report(name, summed), "lr": rate, "grad_norm": size, **metrics}

    @torch.no_grad()
    def _first_codebooks(self, step: int, batches: Sequence[MicroBatch]) -> None:
        """Make the codebooks that are due from the keys of the whole step, all micro-batches and processes.

        In the order of the layers, one pass over the step's batch for each: a layer's keys are those behind codebooks
        that stand already. A pass ends where that layer has its keys, and leaves nothing else behind.
        """
        for turn, (name, player) in enumerate(self.task.players.items()):
            due = [m for m in player.module.modules() if isinstance(m, ScheduledQuantizer) and m.due]
            if not due:
                continue
            with torch.compiler.set_stance("force_eager"):
                for quantizer in due:
                    quantizer.gather()
                    for batch in batches:
                        self._begin_forward(step, batch, turn)
                        with suppress(Gathered):
                            self._forward(name, batch, player.module)
                        let_go(player.module)
                    quantizer.finish_gathering()
            for module in player.module.modules():
                if isinstance(module, Quantizer):
                    module.discard_codebook_statistics()

    def _apart(self, module: nn.Module) -> AbstractContextManager[object]:
        """Gradients of a backward pass in here stay this process's own, for now."""
        return gradients_kept(module) if is_sharded(module) else self.accelerator.no_sync(module)

    def _begin_forward(self, step: int, batch: MicroBatch, turn: int) -> None:
        self._seed_random(step, batch.slot, turn)
        self.task.set_rows(self.slices[batch.slot].start)

    def _forward(self, name: str, batch: MicroBatch, module: nn.Module | None = None) -> Losses:
        bf16 = torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.train.precision == "bf16")
        with bf16, views_may_leave_layers() if self.sharded else nullcontext():
            return self.task.losses(name, self.modules[name] if module is None else module, batch)

    def _gather(self, outputs: Sequence[Losses]) -> tuple[dict[str, float], dict[str, float]]:
        """Loss terms of the whole step; metrics averaged over its rows."""
        terms, metrics = list(outputs[0].terms), list(outputs[0].metrics)
        total = torch.zeros(len(terms) + len(metrics), dtype=torch.float64, device=self.accelerator.device)
        for output, rows in zip(outputs, self.slices, strict=True):
            share = len(rows) / (self.train.batch_size * self.context)
            row = [*(output.terms[key] for key in terms), *(output.metrics[key] * share for key in metrics)]
            total += torch.stack([value.double() for value in row])
        values = sum_over_processes(total, self.accelerator).tolist()
        return dict(zip(terms, values, strict=False)), dict(zip(metrics, values[len(terms) :], strict=True))

    def _where(self, step: int, outputs: Sequence[Losses]) -> str:
        """Which micro-batches have a loss that is not finite; the whole batch when only the gradient is not."""
        bad = [
            self.task.identify(step, rows)
            for rows, output in zip(self.slices, outputs, strict=True)
            if not all(bool(term.isfinite()) for term in output.terms.values())
        ]
        places = [place for places in everyones(bad, self.accelerator) for place in places]
        return "; ".join(dict.fromkeys(places)) or self.task.identify(step, range(self.train.batch_size))

    def _seed_random(self, step: int, slot: int, turn: int) -> None:
        entropy = [self.seed, step, self.accelerator.process_index, slot, turn]
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
        # not torch.manual_seed: that formats a traceback for each kind of device that is not in use, 0.5 ms a call
        torch.default_generator.manual_seed(seed)
        if self.accelerator.device.type != "cpu":
            torch.get_device_module(self.accelerator.device).manual_seed(seed)


def micro_batches(train: OptimizationConfig, rank: int, processes: int, even: bool = False) -> list[range]:
    """The rows of a batch that a process reads, forward pass by forward pass; contiguous, as even as can be.

    even: all processes make as many forward passes, of at most `micro_batch` rows; for one row at a time the processes
    must share the batch evenly.
    """
    rows = range(rank * train.batch_size // processes, (rank + 1) * train.batch_size // processes)
    size = train.micro_batch or len(rows)
    if not even:
        return [rows[i : i + size] for i in range(0, len(rows), size)]
    most = -(-train.batch_size // processes)  # rows of any process
    count = -(-most // (train.micro_batch or most))
    return [rows[i * len(rows) // count : (i + 1) * len(rows) // count] for i in range(count)]
