"""On paper: memory of a GPU and bytes that it sends in a step, by how a run is laid out over GPUs. Nothing is timed.

With P parameters of 4 bytes, AdamW, N processes, n that parameters are cut over, and c that share a sequence:

    weights, gradients, optimizer    (4 + 4 + 8) P / n, and 4 P for DDP's buckets where nothing is cut
    gathered, where n > 1            4 (4 p + 2 r): two layers of p parameters, gradients of one and what is sent of
                                     them, and what lies outside of layers, r, with its gradients
    codebooks                        codes, statistics: whole everywhere
    activations                      of rows · T / c tokens: what `models/footprint.py` finds, which is a + b T

    DDP                              2 (N−1)/N · 4 P                      gradients, summed around a ring
    full, n = N                      (N−1)/N · 4 (3 P − r)                gathered twice (r once), gradients scattered
    hybrid, n of each of N/n         the same over n, and 2 (1 − n/N) · 4 P / n between machines
    codebooks                        2 (N−1)/N · 4 Σ H S (K+1)            statistics of the step
    context                          2 · layers · rows · (`communication.ours`, forward and backward)

`tests/bench/test_scaling.py` holds them against what two processes really keep and hand to collectives.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from transformer_vq.bench import communication
from transformer_vq.config import TransformerVQConfig
from transformer_vq.config.quantizer import VQConfig
from transformer_vq.models import footprint
from transformer_vq.models.describe import TRAINING, describe

MODELS = {"125M": (768, 28), "350M": (1024, 50), "1.3B": (2048, 48), "2.7B": (2560, 66), "7B": (4096, 66)}
"""Width and layers, of the paper's proportions: V = 2 D, K = 128, S = M = 512, 32,000 tokens, tied."""
TOKENS = (8192, 32_768, 131_072, 1_048_576)
GPUS = (8, 64, 512)
MACHINE = 8
"""GPUs of a machine."""
GIB = 2**30
MEMORY = 80 * 10**9
USED = 0.9
"""Of the memory, what is planned with: allocators and libraries take the rest."""
AT = (8192, 16_384)  # lengths at which activations are counted, for a + b T

Row = dict[str, Any]


class Layout(NamedTuple):
    """How a run lies over `gpus`."""

    gpus: int
    shard: str = "none"
    context: int = 1
    checkpoint: bool = False
    """`model.checkpoint_activations`."""

    @property
    def cut(self) -> int:
        """How many processes share the parameters."""
        return {"none": 1, "hybrid": min(MACHINE, self.gpus), "full": self.gpus}[self.shard]

    def words(self) -> str:
        """Like `full, context 8, checkpointing`."""
        name = {"none": "DDP", "hybrid": "hybrid", "full": "full"}[self.shard]
        context = [f"context {self.context}"] if self.context > 1 else []
        return ", ".join([name, *context, *(["checkpointing"] if self.checkpoint else [])])


class Numbers(NamedTuple):
    """Of a model, numbers of parameters and bytes of the rest."""

    parameters: int
    layer: int
    """Of the largest layer."""
    outside: int
    codebooks: int
    statistics: int
    """Numbers that are summed over processes in a step."""


class Line(NamedTuple):
    """a + b T bytes."""

    a: float
    b: float


def model(name: str, checkpoint: bool = False) -> TransformerVQConfig:
    """One of MODELS."""
    width, layers = MODELS[name]
    return TransformerVQConfig(
        vocab_size=32_000,
        width=width,
        layers=layers,
        key_dim=128,
        value_dim=2 * width,
        window=512,
        tied_embedding=True,
        checkpoint_activations=checkpoint,
        quantizer=VQConfig(codes=512),
    )


def numbers(config: TransformerVQConfig, length: int = 8) -> Numbers:
    """Counted on the model itself."""
    found = footprint.training(config, 1, length)
    statistics = sum(
        config.key_value_heads * q.size * (config.key_dim + 1)
        for q in config.layer_quantizers()
        if q.kind == "vq" and q.codebook == "ema"
    )
    parameters = sum(found.parameters) + found.outside
    return Numbers(parameters // 4, max(found.parameters) // 4, found.outside // 4, found.buffers, statistics)


@cache
def activations(name: str, checkpoint: bool) -> Line:
    """Of one row of T tokens on a GPU in bf16: what the backward pass needs, and the most that works beside it."""
    config, (first, second) = model(name, checkpoint), AT

    def most(length: int) -> int:
        found = footprint.training(config, 1, length, precision="bf16", device="cuda")
        kept = found.embedded + sum(part.kept for part in found.layers)
        working = [max(part.forward, part.backward) - part.kept for part in found.layers]
        return kept + max(*working, found.loss.forward, found.loss.backward)

    slope = (most(second) - most(first)) / (second - first)
    return Line(most(first) - slope * first, slope)


def kept(of: Numbers, layout: Layout) -> dict[str, float]:
    """Bytes of one process beside activations."""
    P, n = of.parameters, layout.cut
    return {
        "weights": 4 * P / n,
        "gradients": 4 * P / n,
        "optimizer": 8 * P / n,
        "exchange": 4 * P * (layout.gpus > 1) if n == 1 else 4 * (4 * of.layer + 2 * of.outside),
        "codebooks": of.codebooks,
    }


def sent(of: Numbers, layout: Layout) -> dict[str, float]:
    """Bytes that one process sends in a step for parameters and codebooks, in rings."""
    P, N, n = of.parameters, layout.gpus, layout.cut
    total = 2 * (N - 1) / N
    gathered = (n - 1) / n * 4 * (3 * P - of.outside) + 2 * (1 - n / N) * 4 * P / n
    return {"parameters": total * 4 * P if n == 1 else gathered, "statistics": total * 4 * of.statistics}


def passed_on(config: TransformerVQConfig, rows: int = 1) -> float:
    """Bytes that a process sends along its sequence, forward and backward, in bf16."""
    sizes = communication.Sizes(config.key_dim, config.value_dim, 512, config.window)
    return config.layers * rows * config.key_value_heads * sum(communication.ours(sizes, size=2))


def needed(name: str, tokens: int, layout: Layout) -> Row:
    """A row of the table: one sequence a group of `context` GPUs and step."""
    config = model(name)
    of, line = _numbers(name), activations(name, layout.checkpoint)
    memory = {**kept(of, layout), "activations": line.a + line.b * tokens / layout.context}
    moved = {**sent(of, layout), "context": passed_on(config) if layout.context > 1 else 0.0}
    return {
        "model": name,
        "parameters": of.parameters,
        "tokens": tokens,
        **layout._asdict(),
        "layout": layout.words(),
        "memory": memory,
        "bytes": sum(memory.values()),
        "sent": moved,
        "sent_bytes": sum(moved.values()),
    }


@cache
def _numbers(name: str) -> Numbers:
    return numbers(model(name))


def layouts(tokens: int, gpus: int, window: int = 512) -> Iterator[Layout]:
    """All that there are, the cheapest first: to cut parameters up costs traffic, to checkpoint a third more FLOPs, and
    to share a sequence that others wait.
    """
    shards = ("none", "full") if gpus <= MACHINE else ("none", "hybrid", "full")
    context = 1
    while context <= gpus and tokens // context >= window:
        for checkpoint in (False, True):
            yield from (Layout(gpus, shard, context, checkpoint) for shard in shards)
        context *= 2


def run(
    models: Sequence[str] = tuple(MODELS),
    lengths: Sequence[int] = TOKENS,
    gpus: Sequence[int] = GPUS,
    memory: float = MEMORY,
) -> list[Row]:
    """-> a row each model, length and number of GPUs: the first of `layouts` that fits; its `layout` is None where none
    does, and the numbers are those of the last one.

    memory: bytes of a GPU.
    """
    rows = []
    for name in models:
        for tokens in lengths:
            for n in gpus:
                row: Row = {}
                for layout in layouts(tokens, n):
                    row = needed(name, tokens, layout)
                    if row["bytes"] <= USED * memory:
                        break
                else:
                    row["layout"] = None
                rows.append(row)
    return rows


def cost(settings: Any, flops: float, mfu: float) -> Row:
    """What a recipe takes: tokens, FLOPs, and days of a GPU that does `flops` a second, of which `mfu` is used."""
    train = settings.train
    tokens = train.steps * train.batch_size * train.seq_len
    vocabulary = {"bytes": 256}.get(settings.data.tokenizer) or int(settings.data.tokenizer.partition(":")[2])
    config = settings.model.model_copy(update={"vocab_size": vocabulary})
    found = describe(config, train.seq_len)
    total = TRAINING * found["flops_per_token"] * tokens
    return {
        "parameters": found["parameters"],
        "tokens": tokens,
        "flops_per_token": TRAINING * found["flops_per_token"],
        "flops": total,
        "gpu_days": total / (flops * mfu) / 86_400,
    }


def cells(row: Row) -> list[str]:
    """Of a table."""
    name = row["layout"] or "none fits"
    memory, moved = row["memory"], row["sent"]
    rest = sum(memory.values()) - memory["activations"]
    sizes = [rest, memory["activations"], row["bytes"], moved["parameters"] + moved["statistics"]]
    context = f"{moved['context'] / 2**20:,.0f}" if moved["context"] else ""
    return [
        row["model"], f"{row['tokens']:,}", str(row["gpus"]), name, *(f"{x / GIB:,.1f}" for x in sizes), context
    ]  # fmt: skip


def markdown(rows: list[Row]) -> str:
    """The rows as a table for docs/scaling.md: a line a model and length, a column a number of GPUs."""
    gpus = list(dict.fromkeys(row["gpus"] for row in rows))
    lines = [f"| model | tokens | {' | '.join(f'{n} GPUs' for n in gpus)} |", "|---|---|" + "---|" * len(gpus)]
    by_place = {(row["model"], row["tokens"], row["gpus"]): row for row in rows}
    for name, tokens in dict.fromkeys((row["model"], row["tokens"]) for row in rows):
        cell = [_cell(by_place[name, tokens, n]) for n in gpus]
        lines.append(f"| {name} | {tokens:,} | {' | '.join(cell)} |")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    if row["layout"] is None:
        return "none fits"
    return f"{row['layout']}: {row['bytes'] / GIB:.0f}, {row['sent_bytes'] / GIB:.1f}"


HEADINGS = ("model", "tokens", "GPUs", "layout", "parameters", "activations", "together", "sent", "context, MiB")


def table(rows: list[Row], title: str) -> None:
    """Print the rows; GiB where nothing is said."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title)
    for column in HEADINGS:
        shown.add_column(column, justify="left" if column in ("model", "layout") else "right")
    for row in rows:
        shown.add_row(*cells(row))
    width = None if sys.stdout.isatty() else 132
    Console(width=width).print(shown)
