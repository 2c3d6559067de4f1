"""Sums of rows by index, in one order wherever they are made."""

from __future__ import annotations

from torch import Tensor


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """total[index[r]] += rows[r], in place: total (N, ...), index (R,) int64, rows (R, ...) of total's type.

    On a GPU `index_add_` adds by atomics, in another order every time; `index_put_` sorts first. Compiled code does
    not: the compiler turns either into atomics.
    """
    if total.device.type == "cuda":
        return total.index_put_((index,), rows, accumulate=True)
    return total.index_add_(0, index, rows)
