"""Carried rows dealt to other processes and micro-batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from transformer_vq.training.deal import deal


def carried(slots: list[range]) -> dict[str, Tensor]:
    """Row r holds r, in two tensors a slot."""
    found = {}
    for slot, rows in enumerate(slots):
        numbers = torch.tensor(list(rows))
        found |= {f"{slot}.position": numbers, f"{slot}.0.v": numbers[:, None].repeat(1, 3)}
    return found


def test_every_row_is_found_whoever_had_it() -> None:
    before = [[range(0, 2), range(2, 3)], [range(3, 5), range(5, 6)]]
    held = [carried(slots) for slots in before]
    for after in ([range(0, 6)], [range(1, 4)], [range(4, 5), range(5, 6)], before[1]):
        dealt, want = deal(held, before, after), carried(after)
        assert dealt.keys() == want.keys()
        assert all(torch.equal(dealt[name], want[name]) for name in want)


def test_what_does_not_fit_is_an_error() -> None:
    held = [carried([range(0, 2)]), carried([range(2, 4)])]
    with pytest.raises(ValueError, match="rows 0 to 4 of the batch are not all there"):
        deal(held, [[range(0, 2)], [range(2, 4)]], [range(0, 5)])
    held[1]["0.0.v"] = torch.zeros(2, 7)
    with pytest.raises(ValueError, match=r"0\.v of rows 0 to 3 has several sizes"):
        deal(held, [[range(0, 2)], [range(2, 4)]], [range(0, 4)])
