"""One long row, cut over processes of one thread each, beside one process of one thread: a training step on it, or its
evaluation with full context.

A step is forward, backward, the sum of gradients over processes and AdamW, of the small model of `llama.py`; codebooks
stay. They take turns, so that whatever else the machine does meets both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from transformer_vq import TransformerVQ
from transformer_vq.bench.llama import ours
from transformer_vq.bench.processes import together
from transformer_vq.bench.turns import quartiles
from transformer_vq.data import TokenFile
from transformer_vq.data.tokenizers import ByteTokenizer
from transformer_vq.evaluation import evaluate
from transformer_vq.evaluation.crew import ALONE, Crew
from transformer_vq.training.context import ProcessLine

LENGTHS = (32_768,)
BATCH_SIZE = 8
"""Of the evaluation: a call reads 4,096 tokens."""

Row = dict[str, Any]
Work = Callable[[bool], object]
"""Cut over all processes, or not."""


def run(
    lengths: Sequence[int] = LENGTHS, processes: int = 2, repeats: int = 5, evaluation: bool = False, **changes: Any
) -> list[Row]:
    """-> a row each length: tokens, processes, alone_ms, cut_ms (medians), speedup (median over turns) and its
    quartiles speedup_low, speedup_high.  `changes` to the model of `llama.SHAPES`.
    """
    found = together(_process, processes, list(lengths), repeats, evaluation, changes)[0]
    rows = []
    for length, (alone, cut) in zip(lengths, found, strict=True):
        low, median, high = quartiles([a / b for a, b in zip(alone, cut, strict=True)])
        times = {"alone_ms": 1e3 * statistics.median(alone), "cut_ms": 1e3 * statistics.median(cut)}
        speedups = {"speedup": median, "speedup_low": low, "speedup_high": high}
        rows.append({"tokens": length, "processes": processes, **times, **speedups})
    return rows


def _process(
    line: ProcessLine, lengths: list[int], repeats: int, evaluation: bool, changes: dict[str, Any]
) -> list[tuple[list[float], list[float]]]:
    make = _evaluation if evaluation else _step
    return [_turns(line, make(line, length, ours(**changes)), repeats) for length in lengths]


def _turns(line: ProcessLine, work: Work, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of each turn, of the one process and of all together; the first turn warms up."""
    seconds: tuple[list[float], list[float]] = [], []
    for turn in range(repeats + 1):
        for cut in (False, True):
            dist.barrier()
            start = time.perf_counter()
            if cut or line.first:
                work(cut)
            took = time.perf_counter() - start
            if turn:
                seconds[cut].append(took)
    return seconds


def _step(line: ProcessLine, length: int, model: TransformerVQ) -> Work:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(256, (1, length + 1), generator=torch.Generator().manual_seed(0))

    def work(cut: bool) -> None:
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

    return work


def _evaluation(line: ProcessLine, length: int, model: TransformerVQ) -> Work:
    text = np.random.default_rng(0).integers(256, size=length + 1).astype(np.uint8)
    split = TokenFile("valid", text, np.zeros(1, np.int64), length + 1, 0, ByteTokenizer())
    lines = {n: ProcessLine(None, closes=True, size=n) for n in range(2, line.size + 1)}
    all_of_them = Crew(line.rank, line.size, lines=lines)
    return lambda cut: evaluate(model, split, "full", BATCH_SIZE, crew=all_of_them if cut else ALONE)


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
