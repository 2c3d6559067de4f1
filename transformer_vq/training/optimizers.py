"""Optimizers behind one small interface: named parameters in, a step at a given rate, state as named tensors.

`adamw`      torch's AdamW, as in the paper's enwik8 recipe
`muon`       torch's Muon for hidden matrices (two-dimensional, inside a `ModuleList`, that is in the repeated layers),
             its updates scaled to AdamW's size so that one learning rate serves both; AdamW for everything else
`adafactor`  optax's form, as in the paper's PG-19 and ImageNet64 recipes

Weight decay is ours, the same for all: w ← (1 − decay · rate) w before the step, or (1 − decay) w where
`decay_scaled_by_lr` is off (the paper), on everything that is not one-dimensional. EMA codebooks are buffers and
never here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon
from torch.optim.optimizer import Optimizer

from transformer_vq.config.run import OptimizationConfig
from transformer_vq.training.sharding import part_like

Named = dict[str, nn.Parameter]


class Adafactor(Optimizer):
    """Adafactor without momentum  [Shazeer 1804.04235], as optax has it: what the paper trained with.

    torch's own differs where it matters: it caps the rate at 1/√step (from step 10,000 on, at the paper's 1e-2), and
    factors every matrix. Here: second moments with decay 1 − step^−0.8, factored over the last two axes when both
    have at least 128 entries; update clipped to root mean square 1; times max(1e-3, root mean square of the parameter).
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * self._update(p, p.grad))

    def _update(self, p: Tensor, g: Tensor) -> Tensor:
        state = self.state[p]
        factored = p.ndim >= 2 and min(p.shape[-2:]) >= 128
        if not state:
            state["step"] = torch.tensor(0.0)
            shapes = {"row": p.shape[:-1], "column": (*p.shape[:-2], p.shape[-1])} if factored else {"square": p.shape}
            state.update({name: g.new_zeros(shape) for name, shape in shapes.items()})
        state["step"] += 1
        new = state["step"].item() ** -0.8  # weight of this gradient
        square = g.square() + 1e-30
        if factored:
            row, column = state["row"].lerp_(square.mean(-1), new), state["column"].lerp_(square.mean(-2), new)
            scale = (row / row.mean(-1, keepdim=True)).rsqrt()[..., None] * column.rsqrt()[..., None, :]
        else:
            scale = state["square"].lerp_(square, new).rsqrt()
        update = g * scale
        update = update / _rms(update).clamp_min(1.0)
        step: Tensor = update * _rms(p).clamp_min(1e-3)
        return step


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


class Optimizers:
    """The optimizers of one module, stepped together."""

    def __init__(self, module: nn.Module, train: OptimizationConfig) -> None:
        self.train = train
        self.named: Named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.decayed: list[Tensor] = [p for p in self.named.values() if p.ndim != 1]
        hidden = hidden_matrices(module) if train.optimizer == "muon" else set()
        matrices = [p for name, p in self.named.items() if name in hidden]
        rest = [p for name, p in self.named.items() if name not in hidden]
        self.optimizers: list[Optimizer] = []
        if matrices:
            self.optimizers.append(Muon(matrices, lr=train.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
        if rest and train.optimizer == "adafactor":
            self.optimizers.append(Adafactor(rest, lr=train.lr))
        elif rest:
            self.optimizers.append(AdamW(rest, lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=0.0))

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def gradient_norm(self) -> Tensor:
        """Global norm of all gradients."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.named.values() if p.grad is not None])

    def step(self, rate: float, norm: Tensor) -> None:
        """Clip by the global norm `norm`, decay, and update at learning rate `rate`."""
        if self.train.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.named.values(), self.train.clip, norm)
        if self.train.weight_decay:
            shrink = self.train.weight_decay * (rate if self.train.decay_scaled_by_lr else 1.0)
            with torch.no_grad():
                torch._foreach_mul_(self.decayed, 1 - shrink)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Everything that the optimizers remember, as tensors named `parameter/slot`; cut up where parameters are."""
        return {
            f"{name}/{slot}": value
            for name, p in self.named.items()
            for optimizer in self.optimizers
            for slot, value in optimizer.state.get(p, {}).items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Put back what `state()` gave, whole or in parts cut as parameters are.

        Raises KeyError for a parameter that is not here.
        """
        owner = {
            p: optimizer for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]
        }
        for key, value in state.items():
            name, _, slot = key.rpartition("/")
            p = self.named[name]
            owner[p].state[p][slot] = value.clone() if slot == "step" else part_like(value, p)


def hidden_matrices(module: nn.Module) -> set[str]:
    """Names of the two-dimensional parameters inside a `ModuleList`: of repeated layers, not embedding and head."""
    prefixes = tuple(f"{name}." for name, inner in module.named_modules() if isinstance(inner, nn.ModuleList))
    return {name for name, p in module.named_parameters() if p.ndim == 2 and name.startswith(prefixes)}
