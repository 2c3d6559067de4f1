"""What a language model carries between calls: one state a layer, and where each row stands in its document.

All tensors have the batch as their first axis; all are detached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from transformer_vq.models.attention import Carried, LayerState
from transformer_vq.models.split import Line
from transformer_vq.ops.attention.full import FullState, trim


class ModelState(NamedTuple):
    """State of B rows.  Constant in the tokens read, except for layers with full attention."""

    layers: tuple[LayerState, ...]
    position: Tensor
    """(B,) int64: real tokens read of the current document; without segments, of the stream. 0: nothing read."""
    segment: Tensor
    """(B,) int64: id of the last real token's segment; means nothing where `position` is 0."""
    draws: Tensor
    """(B,) int64: what the dropout that lasts a sequence follows from; 0: nothing drawn yet."""
    inputs: tuple[Tensor, ...] = ()
    """One a layer, (B, conv-1, D): the last inputs of its short convolution; empty without one."""

    def of_layer(self, i: int) -> Carried:
        """What layer i carries."""
        return Carried(self.layers[i], self.inputs[i] if self.inputs else None)

    def reset_rows(self, fresh: Tensor) -> ModelState:
        """The rows where fresh (B,) bool is True start anew, as with `state=None`; the others go on.

        Full attention drops the keys that no row sees any more, or a stream of many sequences would keep them all.
        """
        reset = self._map(lambda x: x.masked_fill(fresh.to(x.device).view(-1, *[1] * (x.ndim - 1)), 0))
        layers = tuple(trim(layer) if isinstance(layer, FullState) else layer for layer in reset.layers)
        return reset._replace(layers=layers)

    def select_rows(self, rows: Tensor) -> ModelState:
        """Rows by index (N,) int64, in that order; an index may repeat, as beams and several samples a prompt need."""
        return self._map(lambda x: x.index_select(0, rows.to(x.device)))

    def _map(self, change: Callable[[Tensor], Tensor]) -> ModelState:
        """`change` applied to every tensor."""
        layers = tuple(type(layer)(*map(change, layer)) for layer in self.layers)
        inputs = tuple(map(change, self.inputs))
        return ModelState(layers, change(self.position), change(self.segment), change(self.draws), inputs)


def closed(line: Line, state: ModelState) -> ModelState:
    """What the process keeps of the state behind its piece: in a line that closes, the first one the last one's, which
    its rows go on from, and the others what is drawn for the rows."""
    if not line.closes:
        return state
    tensors: list[Tensor] = []
    state._map(lambda x: tensors.append(x) or x)  # type: ignore[func-returns-value]
    found = iter(line.to_first(tensors))
    return state._map(lambda _: next(found)) if line.first else state._replace(layers=(), inputs=())
