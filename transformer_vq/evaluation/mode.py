"""How a model is held while it is measured or sampled from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module, in_step: bool = False) -> Iterator[torch.device]:
    """Evaluation mode and no gradients inside, the former mode after; yields the device of the model's parameters.

    in_step: parameters are cut up over processes. What is gathered of them goes on being used in training, so it must
    not be made in inference mode.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad() if in_step else torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        model.train(training)


def call_on_nothing(model: nn.Module, device: torch.device) -> None:
    """A call on padding, whose answer nobody reads and no listener counts: its share of a call that others make."""
    padding = torch.zeros(1, 1, dtype=torch.int64, device=device)
    model(padding, mask=padding.bool())
