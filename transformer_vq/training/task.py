"""What the loop trains: something with batches, a loss and an evaluation. It never asks what that is.

A task has one or more *players*, modules that take turns in every optimizer step, each with its own loss and optimizer.
A language model or a VQ-VAE is one player; a VQ-GAN is two, autoencoder and discriminator.

A step's rows are split over processes, and those of a process over micro-batches. A loss is a sum of terms, each a mean
over some count (tokens, images); the loop weighs every micro-batch's term by its share of the count over the whole step
and all processes, so that the gradient is the one of a single large batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from transformer_vq.config.run import OptimizationConfig
from transformer_vq.evaluation.crew import ALONE, Crew
from transformer_vq.quantizers import Quantizer


class MicroBatch(NamedTuple):
    """What one forward pass reads."""

    inputs: Any
    """The task's own, on the right device."""
    counts: dict[str, int]
    """By loss term: over how many units its mean is taken. The same names in every micro-batch."""
    units: int
    """Tokens or images, for progress and speed."""
    slot: int = 0
    """Which of the process's micro-batches this is; what a task carries from step to step is kept by it."""


class Losses(NamedTuple):
    """What one forward pass gives."""

    terms: dict[str, Tensor]
    """Scalars with gradient, named as in `MicroBatch.counts`, each a mean over its count, 0 where there is nothing to
    count; their sum is minimised. No terms at all: the player sits this step out (a discriminator before its start)."""
    metrics: dict[str, Tensor] = {}  # noqa: RUF012
    """Detached scalars for the record, averaged over rows; the same names on every process."""


class Player(NamedTuple):
    """A module that is trained, and how."""

    module: nn.Module
    train: OptimizationConfig
    """Optimizer, rate, decay and clipping are read from here; everything else from the run's own."""
    partly_used: bool = False
    """Some parameters take no part in some steps (`start_step`); costs DDP a walk through the graph."""


class EvaluationStopped(Exception):
    """A signal came during an evaluation, which gave up."""


class Task(ABC):
    """The base of every task. What has a body here may be left as it is."""

    stop_asked: Callable[[], bool] = staticmethod(lambda: False)
    """The loop's: whether a signal asks the run to stop."""

    crew: Crew = ALONE
    """The loop's: the processes that evaluate together."""
    evaluates_together: ClassVar[bool] = False
    """Whether `evaluate` is called on all processes of the crew, which return the same, or on the main one alone."""
    unit: ClassVar[str] = "tokens"
    """What `MicroBatch.units` counts."""
    primary: str = "loss"
    """The metric of `evaluate("valid")` that chooses the best checkpoint; lower is better."""
    flops_per_unit: float | None = None
    """Of a forward and a backward pass, as `models/describe.py` counts them; None: not counted, so no MFU."""
    splits: ClassVar[tuple[str, ...]] = ("valid", "test")
    """What is evaluated at the end; the first also during training."""
    players: Mapping[str, Player]
    """In the order of their turns; the first gives the record its plain names."""

    @abstractmethod
    def batch(self, step: int, rows: range, slot: int) -> MicroBatch:
        """Rows of the batch of `step`: a pure function of (seed, step, rows), whatever was asked before.

        Asked by a thread of its own while the step before is made (reader.py): it shares nothing that changes.
        """

    @abstractmethod
    def losses(self, player: str, module: nn.Module, batch: MicroBatch) -> Losses:
        """The player's loss. `module` is its module as the loop wrapped it: call that, and once, for gradients to
        be shared between processes."""

    @abstractmethod
    def evaluate(self, split: str, final: bool) -> dict[str, Any]:
        """Numbers about a split; `final` at the end of the run, when nothing may be cut short.

        On the main process, or with `evaluates_together` on all.
        """

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """What is about to be trained, for the first screen: heading -> line."""

    def fingerprint(self) -> dict[str, str]:
        """What the data is, by content, which must be the same on all processes."""
        return {}

    def compile(self, player: str) -> None:
        """`train.compile` is on: compile the player's module, in place."""
        self.players[player].module.compile()

    def set_step(self, step: int) -> None:  # noqa: B027
        """A step begins."""

    def set_rows(self, first_row: int) -> None:  # noqa: B027
        """The next `losses` reads the rows of the step's batch from this one on: noise goes by row."""

    def after_update(self, player: str) -> None:  # noqa: B027
        """The player's parameters have just moved: codebook statistics are applied here."""

    def report(self, player: str, losses: Mapping[str, float]) -> dict[str, float]:
        """A player's loss terms over the whole step -> numbers for the record, beside their sum `loss`."""
        return {f"loss_{name}": value for name, value in losses.items()}

    def check_stop(self, done: int = 0, total: int = 0) -> None:
        """To be called between two batches of an evaluation.  Raises EvaluationStopped when the run is to stop."""
        if self.stop_asked():
            raise EvaluationStopped

    def abandon(self) -> None:
        """A step will not be finished: forget what its forward passes left. Nothing was updated yet."""
        for player in self.players.values():
            for module in player.module.modules():
                forget = getattr(module, "discard_codebook_statistics", None)
                if callable(forget):
                    forget()

    def quantizers(self) -> dict[str, Quantizer]:
        """By name, those that quantize now: trackers show the distribution of their codes."""
        return {}

    def identify(self, step: int, rows: range) -> str:
        """Where rows of a batch come from, for an error message."""
        return f"rows {rows.start}-{rows.stop - 1} of step {step}"

    def carried(self) -> dict[str, Tensor]:
        """What this process carries from step to step beside parameters and buffers: the attention state of streams."""
        return {}

    def restore(self, carried: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Take back what `carried` gave."""

    def warm_start(self, weights: dict[str, Tensor], run: Path) -> list[str]:
        """Start the first player from another run's weights; returns what was taken and what was not."""
        raise NotImplementedError(f"{type(self).__name__} cannot start from another run")

    def check_resumes(self, folder: Path) -> None:  # noqa: B027
        """The run in `folder` is about to go on (main process).  Raises ConfigError where its past was another."""

    def begin(self, folder: Path) -> None:  # noqa: B027
        """The run begins or goes on: write what else belongs into its folder (main process)."""

    def finish(self, folder: Path) -> None:  # noqa: B027
        """The run is done: write what else belongs into its folder (main process)."""
