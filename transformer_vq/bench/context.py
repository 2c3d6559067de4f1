"""A training step on one long row: cut over processes of one thread each, beside one process of one thread.

Forward, backward, the sum of gradients over processes and AdamW, of the small model of `llama.py`; codebooks stay. They
take turns, so that whatever else the machine does meets both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from transformer_vq.bench.llama import ours
from transformer_vq.bench.processes import together
from transformer_vq.bench.turns import quartiles
from transformer_vq.training.context import ProcessLine

LENGTHS = (32_768,)

Row = dict[str, Any]


def run(lengths: Sequence[int] = LENGTHS, processes: int = 2, repeats: int = 5, **changes: Any) -> list[Row]:
    """-> a row each length: tokens, processes, alone_ms, cut_ms (medians), speedup (median over turns) and its
    quartiles speedup_low, speedup_high.  `changes` to the model of `llama.SHAPE`.
    """
    found = together(_process, processes, list(lengths), repeats, changes)[0]
    rows = []
    for length, (alone, cut) in zip(lengths, found, strict=True):
        low, median, high = quartiles([a / b for a, b in zip(alone, cut, strict=True)])
        times = {"alone_ms": 1e3 * statistics.median(alone), "cut_ms": 1e3 * statistics.median(cut)}
        speedups = {"speedup": median, "speedup_low": low, "speedup_high": high}
        rows.append({"tokens": length, "processes": processes, **times, **speedups})
    return rows


def _process(
    line: ProcessLine, lengths: list[int], repeats: int, changes: dict[str, Any]
) -> list[tuple[list[float], list[float]]]:
    return [_turns(line, length, repeats, changes) for length in lengths]


def _turns(line: ProcessLine, length: int, repeats: int, changes: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Seconds of each turn, of the one process and of all together; the first turn warms up."""
    model = ours(**changes).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(256, (1, length + 1), generator=torch.Generator().manual_seed(0))
    seconds: tuple[list[float], list[float]] = [], []
    for turn in range(repeats + 1):
        for cut in (False, True):
            dist.barrier()
            start = time.perf_counter()
            if cut or line.first:
                piece = line.piece(length) if cut else slice(0, length)
                x, y = tokens[:, :-1][:, piece], tokens[:, 1:][:, piece]
                with model.split_over(line if cut else None):
                    loss = model(x, labels=y, logits=False).loss
                assert loss is not None
                (loss / (line.size if cut else 1)).backward()
                if cut:
                    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
                    dist.all_reduce(gradients)
                optimizer.step()
                optimizer.zero_grad()
                model.discard_codebook_statistics()
            took = time.perf_counter() - start
            if turn:
                seconds[cut].append(took)
    return seconds


def table(rows: list[Row], title: str) -> None:
    """Print the rows."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title)
    for column in ("tokens", "processes", "alone, ms", "cut, ms", "speedup", "quartiles"):
        shown.add_column(column, justify="right")
    for row in rows:
        times = [f"{row[name]:,.0f}" for name in ("alone_ms", "cut_ms")]
        spread = f"{row['speedup_low']:.2f}-{row['speedup_high']:.2f}"
        shown.add_row(f"{row['tokens']:,}", str(row["processes"]), *times, f"{row['speedup']:.2f}", spread)
    Console().print(shown)
