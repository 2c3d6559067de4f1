"""A Transformers `Cache` of constant size: the state of every layer, whatever the length of the text read."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from transformer_vq.models import ModelState


class TransformerVQCache(Cache):
    """What the model has read so far. Passed back, it is continued; `copy.deepcopy` keeps a place to return to.

    A call replaces the state, it never writes into its tensors.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: ModelState | None = None
        self.seen = 0
        """Columns read, padding included: what `get_seq_length` answers, by which `generate` cuts its input."""

    def advance(self, state: ModelState, columns: int) -> None:
        """So many more columns are read."""
        self.state, self.seen = state, self.seen + columns

    def __len__(self) -> int:
        """Layers that have a state."""
        return 0 if self.state is None else len(self.state.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is none."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(columns with the new ones, 0): a mask covers all that was read."""
        return self.seen + query_length, 0

    @property
    def is_compileable(self) -> bool:
        """Its shapes are constant, but it is replaced in every call."""
        return False

    @property
    def is_croppable(self) -> bool:
        """What is folded into means cannot be taken out again."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError unless nothing is to be removed."""
        if tokens_to_remove:
            raise ValueError(
                "a Transformer-VQ cache cannot be cropped: old keys are means by now; copy it before reading"
            )

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.seen = None, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows by index, as beam search moves them."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may repeat."""
        if self.state is not None:
            self.state = self.state.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        if self.state is not None:
            rows = torch.arange(len(self.state.position), device=self.state.position.device)
            self.state = self.state.select_rows(rows.repeat_interleave(repeats))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.seen} columns read)"

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Raises NotImplementedError: layers keep no keys here, the model replaces the whole state."""
        raise NotImplementedError("a Transformer-VQ cache holds states, not keys and values")
