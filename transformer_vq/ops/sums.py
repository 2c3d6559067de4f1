"""Sums of rows by index, in one order wherever they are made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """total[index[r]] += rows[r], in place: total (N, ...), index (R,) int64, rows (R, ...) of total's type.

    On a GPU `index_add_` adds by atomics, in another order every time; `index_put_` sorts first. A compiler would turn
    either into atomics: it gets an operation of ours, which it leaves alone, unless it is asked for gradients.
    """
    asked = torch.is_grad_enabled() and (total.requires_grad or rows.requires_grad)
    if torch.compiler.is_compiling() and not asked:
        _add_rows_op(total, index, rows)
        return total
    return _add_rows(total, index, rows)


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    if total.device.type == "cpu":
        return total.index_add_(0, index, rows)
    return total.index_put_((index,), rows, accumulate=True)


@torch.library.custom_op("transformer_vq::add_rows", mutates_args=("total",))
def _add_rows_op(total: Tensor, index: Tensor, rows: Tensor) -> None:
    _add_rows(total, index, rows)


@_add_rows_op.register_fake
def _(total: Tensor, index: Tensor, rows: Tensor) -> None:
    pass


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """table[index], differentiable: (N, D), (...) int64 -> (..., D).

    PyTorch adds the gradients of equal rows in one order; its compiler would by atomics.
    """
    if torch.compiler.is_compiling() and table.requires_grad:
        rows: Tensor = Taken.apply(table, index)  # type: ignore[no-untyped-call]
        return rows
    return F.embedding(index, table)


class Taken(torch.autograd.Function):
    """`take_rows`, whose backward pass is `add_rows`."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        """See `take_rows`."""
        ctx.save_for_backward(index)
        ctx.size = len(table)
        return F.embedding(index, table)

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None]:
        """d_table[index] += d_rows."""
        (index,) = ctx.saved_tensors
        d_table = d_rows.new_zeros(ctx.size, d_rows.shape[-1])
        return add_rows(d_table, index.flatten(), d_rows.reshape(-1, d_rows.shape[-1])), None
