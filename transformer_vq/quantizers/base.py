"""What every quantizer offers to attention and to the image models: one result type and one small interface."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Quantized(NamedTuple):
    """Result of quantizing keys k (B, H, T, K) with a codebook (H, S, K)."""

    codes: Tensor
    """(B, H, T) int64."""
    quantized: Tensor
    """(B, H, T, K) in the keys' dtype; forward value bitwise a codebook row, gradient by the estimator."""
    loss: Tensor
    """Scalar, fp32 or wider: every auxiliary term times its weight; add it to the training loss as it is."""
    commitment: Tensor
    """Scalar, unweighted: squared distance summed over heads and width, mean over real tokens  [Lingle 2309.16354]."""
    metrics: dict[str, Tensor]
    """Detached scalars: codebook health of this batch (names in `quantizers/health.py`)."""


class Quantizer(nn.Module):
    """Keys in, codes out. Subclasses own what they learn and call `ops/` for the arithmetic.

    `forward(k, mask=None)`: k (B, H, T, K), mask (B, T) bool, True where a token is real -> `Quantized`.
    """

    def forward(self, k: Tensor, mask: Tensor | None = None) -> Quantized:
        """See the class."""
        raise NotImplementedError

    def find(self, k: Tensor) -> Tensor:
        """The codes (B, H, T) of keys (B, H, T, K) alone: no losses, no metrics, no gradient, nothing collected."""
        raise NotImplementedError

    @property
    def codebook(self) -> Tensor:
        """(H, S, K): the row of each code."""
        raise NotImplementedError

    @property
    def warming_up(self) -> bool:
        """True while keys pass unquantized (`start_step`): attention is then full, on the keys themselves."""
        return False

    def set_step(self, step: int) -> None:
        """Tell the optimizer step, on which schedules, warm starts and seeded noise depend."""

    def set_rows(self, first_row: int | Tensor, first_place: int | Tensor = 0) -> None:
        """Tell which row of the step's batch the next forward passes' first row is, and at which place rows begin.

        Noise follows from both, and from the step; it must not change between a forward pass and its backward pass.
        Nobody told: rows from 0, places from 0.
        """

    @property
    def due(self) -> bool:
        """True when the codebook is to be made from keys of this step, before anything else is done in it."""
        return False

    def wake(self) -> None:
        """Tensors were written by someone else than `load_state_dict`: what Python knows of them is read anew."""

    def apply_codebook_statistics(self) -> None:
        """Move the codebook by what forward passes in training collected; called once per optimizer step."""

    def discard_codebook_statistics(self) -> None:
        """Forget what was collected, for a step that is skipped."""
