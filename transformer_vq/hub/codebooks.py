"""Codebooks under anybody's trainer: whenever an optimizer that holds a model's parameters steps, its codebooks do too.

No trainer of others knows of them. torch calls a hook after every step of every optimizer, not after a forward pass or
a micro-batch, and not after a step that a gradient scaler skips: the very moment that our own loop takes.
"""

from __future__ import annotations

from typing import Any, Protocol
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class Stepped(Protocol):
    """A model that wants to hear of its optimizer's steps."""

    def parameters(self) -> Any:
        """As nn.Module has them."""

    def after_optimizer_step(self) -> None:
        """Its parameters have just moved."""


_models: WeakSet[Any] = WeakSet()


def follow(model: nn.Module) -> None:
    """Call `model.after_optimizer_step()` from now on, as long as it lives."""
    if not _models:
        _install()
    _models.add(model)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for model in list(_models):
        if any(id(p) in held for p in model.parameters()):
            model.after_optimizer_step()


_installed: list[Any] = []


def _install() -> None:
    if not _installed:
        _installed.append(register_optimizer_step_post_hook(_after_step))
