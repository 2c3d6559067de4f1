"""Sums of rows by index, in one order wherever they are made."""

from __future__ import annotations

import torch
from torch import Tensor


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """total[index[r]] += rows[r], in place: total (N, ...), index (R,) int64, rows (R, ...) of total's type.

    On a GPU `index_add_` adds by atomics, in another order every time; `index_put_` sorts first. A compiler would turn
    either into atomics: it gets an operation of ours, which it leaves alone, unless it is asked for gradients.
    """
    if torch.compiler.is_compiling() and not (total.requires_grad or rows.requires_grad):
        _add_rows_op(total, index, rows)
        return total
    return _add_rows(total, index, rows)


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    if total.device.type == "cuda":
        return total.index_put_((index,), rows, accumulate=True)
    return total.index_add_(0, index, rows)


@torch.library.custom_op("transformer_vq::add_rows", mutates_args=("total",))
def _add_rows_op(total: Tensor, index: Tensor, rows: Tensor) -> None:
    _add_rows(total, index, rows)


@_add_rows_op.register_fake
def _(total: Tensor, index: Tensor, rows: Tensor) -> None:
    pass
