"""The keys of every layer from outside: what the task wants of them, what the quantizer's own loss wants, their rank.

Su Jianlin's warning in one number, `task_share` = ‖∂ task loss/∂k‖ / ‖∂ quantizer's loss/∂k‖: where it falls below 1,
the commitment term wins, and with `rotation` a small ‖q‖/‖k‖ makes it fall.

Axes:  B batch  H heads  T length  K key width
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from transformer_vq.quantizers.base import Quantized, Quantizer
from transformer_vq.quantizers.health import effective_rank


class KeyProbe:
    """Keeps what each quantizer was given and gave in the last forward pass inside the `with` block, graph included."""

    def __init__(self, quantizers: Mapping[int, Quantizer]) -> None:
        """quantizers: by layer, those that quantize."""
        self.quantizers = quantizers
        self.keys: dict[int, Tensor] = {}
        """(B, H, T, K) by layer."""
        self.codebooks: dict[int, Tensor] = {}
        """(H, S, K) by layer; copies, since a layer whose parameters are cut up is whole in its forward pass alone."""
        self.results: dict[int, Quantized] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        self._hooks = [q.register_forward_hook(self._listener(i)) for i, q in self.quantizers.items()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _listener(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...], Quantized], None]:
        def listen(quantizer: nn.Module, inputs: tuple[Any, ...], result: Quantized) -> None:
            self.keys[layer], self.results[layer] = inputs[0], result
            with torch.no_grad():  # nothing is saved for a backward pass that recomputes the layer without this hook
                self.codebooks[layer] = self.quantizers[layer].codebook.clone()

        return listen

    def gradients(self, loss: Tensor) -> dict[int, Tensor]:
        """∂ loss/∂k by layer, zero where a key has no part in it. The graph is kept; no parameter gets a gradient."""
        if not self.keys:
            return {}
        found = (
            torch.autograd.grad(loss, list(self.keys.values()), retain_graph=True, allow_unused=True)
            if loss.requires_grad
            else [None] * len(self.keys)
        )
        return {
            layer: torch.zeros_like(k) if gradient is None else gradient
            for (layer, k), gradient in zip(self.keys.items(), found, strict=True)
        }

    def task_shares(self, task: Tensor, own: Tensor) -> dict[str, Tensor]:
        """`layer0/task_share` and so on, for losses of the last forward pass; only of layers with a loss of their own.

        Costs about one more backward pass.
        """
        shares = {}
        of_own = self.gradients(own)
        for layer, gradient in self.gradients(task).items():
            size = of_own[layer].norm()
            if size > 0:
                shares[f"layer{layer}/task_share"] = (gradient.norm() / size).detach()
        return shares

    @torch.no_grad()
    def ranks(self) -> dict[str, Tensor]:
        """`layer0/key_rank`, of the keys of the last forward pass, and `layer0/code_rank`; see `effective_rank`."""
        found = {}
        for layer, k in self.keys.items():
            codebook = self.codebooks[layer]
            keys = k.transpose(0, 1).flatten(1, 2).to(codebook.dtype)
            found[f"layer{layer}/key_rank"] = effective_rank(keys.mT @ keys)
            found[f"layer{layer}/code_rank"] = effective_rank(codebook.mT @ codebook)
        return found
