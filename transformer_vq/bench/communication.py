"""Bytes that a process sends for one layer where N share a sequence: ours, and ring attention's, which sends all keys.

Ours is `train.context_parallel`: forward a window of keys and values and the counts and means of older ones, backward
their gradient. Ring attention  [Liu 2310.01889]  sends each process's keys and values past all others, forward and
backward, and their gradients once more around and home.

Up to MOST processes both are done, over gloo, and the bytes in the messages are counted; for more they follow from the
formulas, which are held against those counts. The sizes are those of one row and one key head.

Letters:  T tokens  N processes  K, V widths  S codes  M window
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transformer_vq.bench.processes import together
from transformer_vq.models.split import attention_before
from transformer_vq.ops.attention.arguments import Arguments
from transformer_vq.training.context import ProcessLine

LENGTHS = (8192, 32_768, 131_072, 1_048_576)
PROCESSES = (2, 4, 8, 64, 512)
MOST = 4

Row = dict[str, Any]


class Sizes(NamedTuple):
    """Of one key head; fp32."""

    K: int = 64
    V: int = 64
    S: int = 512
    M: int = 512


SIZES = Sizes()


def ours(sizes: Sizes, size: int = 4) -> tuple[int, int]:
    """Bytes forward, backward, keys and values of `size` bytes.

    Codes are int64; 16 bytes say where the row stands, M which slots hold a key.
    """
    K, V, S, M = sizes
    keys, means = size * M * (K + V), 4 * S * V
    return keys + means + 4 * S + 8 * M + M + 16, keys + means


def ring(T: int, N: int, sizes: Sizes) -> tuple[int, int]:
    """Bytes forward, backward."""
    block = 4 * (T // N) * (sizes.K + sizes.V)
    return (N - 1) * block, (N - 1) * block + N * block


def run(
    lengths: Sequence[int] = LENGTHS,
    processes: Sequence[int] = PROCESSES,
    sizes: Sizes = SIZES,
) -> list[Row]:
    """-> a row each length and number of processes: tokens, processes, counted (else by formula), bytes forward and
    backward, `ring_forward`, `ring_backward`, ratio (ring over ours, both ways together).

    Raises RuntimeError where what was counted is not what the formulas say.
    """
    rows = []
    for N in processes:
        fitting = [T for T in lengths if T % N == 0 and T // N >= sizes.M]
        counted = count(fitting, N, sizes) if N <= MOST else {}
        for T in fitting:
            formula = (*ours(sizes), *ring(T, N, sizes))
            if N <= MOST and counted[T] != formula:
                raise RuntimeError(
                    f"{T} tokens on {N} processes: counted {counted[T]} bytes, the formulas say {formula}"
                )
            forward, backward, ring_forward, ring_backward = formula
            rows.append(
                {
                    "tokens": T,
                    "processes": N,
                    "counted": N <= MOST,
                    "forward": forward,
                    "backward": backward,
                    "ring_forward": ring_forward,
                    "ring_backward": ring_backward,
                    "ratio": (ring_forward + ring_backward) / (forward + backward),
                }
            )
    return rows


def count(lengths: Sequence[int], N: int, sizes: Sizes) -> dict[int, tuple[int, int, int, int]]:
    """The most bytes that any of N processes sent, by length: ours forward and backward, ring forward and backward."""
    found = together(_process, N, list(lengths), sizes)
    most = [[max(values) for values in zip(*at_length, strict=True)] for at_length in zip(*found, strict=True)]
    return {T: tuple(values) for T, values in zip(lengths, most, strict=True)}


def _process(line: ProcessLine, lengths: list[int], sizes: Sizes) -> list[tuple[int, int, int, int]]:
    return [(*_ours(line, T // line.size, sizes), *_ring(line, T // line.size, sizes)) for T in lengths]


def _ours(line: ProcessLine, T: int, sizes: Sizes) -> tuple[int, int]:
    """Bytes of what a layer does beside its attention, which sends nothing."""
    K, V, S, M = sizes
    codebook = torch.randn(1, S, K)
    codes = torch.randint(S, (1, 1, T))
    k_hat = codebook[:, codes[0, 0]][None].requires_grad_()
    v = torch.randn(1, 1, T, V, requires_grad=True)
    line.sent = 0
    x = attention_before(line, Arguments(k_hat.detach(), k_hat, v, codes, codebook, window=M))
    forward = line.sent
    heard = x.state.learned() if x.state is not None else []
    torch.stack([y.sum() for y in (x.v, *heard)]).sum().backward()
    return forward, line.sent - forward


def _ring(line: ProcessLine, T: int, sizes: Sizes) -> tuple[int, int]:
    """Bytes of blocks that go round, attention left out."""
    sent = []
    for hops in (line.size - 1, line.size - 1 + line.size):  # backward: blocks once more, gradients all the way home
        block: list[Tensor] = [torch.zeros(T, sizes.K), torch.zeros(T, sizes.V)]
        line.sent = 0
        for _ in range(hops):
            line.send(block, (line.rank + 1) % line.size)
            block = line.receive(block, (line.rank - 1) % line.size)
        sent.append(line.sent)
    return sent[0], sent[1]


def table(rows: list[Row], title: str) -> None:
    """Print the rows."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title)
    for column in ("tokens", "over", "", "ours, KiB", "back", "ring, MiB", "back", "ratio"):
        shown.add_column(column, justify="right")
    for row in rows:
        kib, mib = [[row[f"{whose}forward"], row[f"{whose}backward"]] for whose in ("", "ring_")]
        sizes = [f"{x / 2**10:,.0f}" for x in kib] + [f"{x / 2**20:,.0f}" for x in mib]
        how = "counted" if row["counted"] else "formula"
        shown.add_row(f"{row['tokens']:,}", str(row["processes"]), how, *sizes, f"{row['ratio']:,.0f}")
    Console().print(shown)
