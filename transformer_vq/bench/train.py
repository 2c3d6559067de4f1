"""A training step of a small model with quantized keys beside one of `transformers`' Llama of the same shape.

Forward, backward, AdamW and the codebooks' update; the same tokens a step at every length.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transformer_vq.bench import work
from transformer_vq.bench.device import Ceilings
from transformer_vq.bench.llama import llama, ours
from transformer_vq.bench.turns import in_turns, quartiles, ratios, spread
from transformer_vq.models import TransformerVQ
from transformer_vq.models.describe import describe
from transformer_vq.ops.pages import keep_pages

LENGTHS = (512, 4096, 8192)
TOKENS = 8192
"""A step reads so many, in rows of the length at hand; at least one row."""

AXIS = "tokens of a row"

Row = dict[str, float]


def run(
    lengths: Sequence[int] = LENGTHS, repeats: int = 5, tokens: int = TOKENS, compiled: bool = False, **changes: Any
) -> list[Row]:
    """-> a row each length: length, rows, vq_ms, llama_ms (medians), ratio (llama over vq, median over turns) and its
    quartiles ratio_low, ratio_high; vq_low, vq_high; gflop and mib of our step by `work.py`.  compiled: the same model
    under `train.compile` takes part, with compiled_ms and compiled (how many times as fast as without, with quartiles
    compiled_low, compiled_high).  `changes` to the model of `llama.SHAPE`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    keep_pages()  # as the training loop does; for both
    found: list[Row] = []
    for length in lengths:
        batch = max(1, tokens // length)
        model = ours(**changes).to(device)
        contest = {
            "vq": vq_step(model, batch, length, device),
            "llama": llama_step(llama(model.config).to(device), batch, length, device),
        }
        if compiled:
            faster = ours(**changes).to(device)
            faster.compile()
            contest["compiled"] = vq_step(faster, batch, length, device)
        seconds = in_turns(contest, repeats, device)
        low, median, high = ratios(seconds["llama"], seconds["vq"])
        found.append(
            {
                "length": length,
                "rows": batch,
                "vq_ms": 1e3 * quartiles(seconds["vq"])[1],
                "vq_low": 1e3 * quartiles(seconds["vq"])[0],
                "vq_high": 1e3 * quartiles(seconds["vq"])[2],
                "llama_ms": 1e3 * statistics.median(seconds["llama"]),
                "ratio": median,
                "ratio_low": low,
                "ratio_high": high,
                **_work(model, batch * length, length),
                **(_gain(seconds["vq"], seconds["compiled"]) if compiled else {}),
            }
        )
    return found


def _gain(eager: list[float], compiled: list[float]) -> Row:
    named = spread("compiled", "compiled_low", "compiled_high", ratios(eager, compiled))
    return {"compiled_ms": 1e3 * statistics.median(compiled), **named}


def _work(model: TransformerVQ, tokens: int, length: int) -> Row:
    needed = work.training(describe(model.config, length)["flops_per_token"], tokens, count(model))
    return {"gflop": needed.flops / 1e9, "mib": needed.bytes / 2**20}


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def lines(rows: list[Row]) -> dict[str, list[tuple[float, float, float, float]]]:
    """For the picture, by implementation: length and seconds."""

    def flat(name: str) -> list[tuple[float, float, float, float]]:
        return [(r["length"], r[name] / 1e3, r[name] / 1e3, r[name] / 1e3) for r in rows]

    ours = [(r["length"], r["vq_low"] / 1e3, r["vq_ms"] / 1e3, r["vq_high"] / 1e3) for r in rows]
    more = {"compiled": flat("compiled_ms")} if "compiled_ms" in rows[0] else {}
    return {"quantized keys": ours, "Llama": flat("llama_ms"), **more}


def floor(rows: list[Row], ceilings: Ceilings) -> list[tuple[float, float]]:
    """Length, and the least seconds that our step could take."""
    return [(r["length"], work.Work(1e9 * r["gflop"], 2**20 * r["mib"]).seconds(*ceilings)) for r in rows]


def vq_step(model: TransformerVQ, batch: int, length: int, device: str) -> Callable[[], None]:
    """A step of ours, as the training loop takes it."""
    tokens, optimizer = text(batch, length, device), torch.optim.AdamW(model.parameters())

    def step() -> None:
        loss = model(tokens, labels=tokens.roll(-1, 1), logits=False).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.apply_codebook_statistics()

    return step


def llama_step(model: nn.Module, batch: int, length: int, device: str) -> Callable[[], None]:
    """A step of Llama's."""
    tokens, optimizer = text(batch, length, device), torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def text(batch: int, length: int, device: str) -> Tensor:
    """Random bytes."""
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)


def table(rows: list[Row], title: str) -> None:
    """Print the rows."""
    from rich.console import Console
    from rich.table import Table

    more = ("compiled, ms", "VQ / compiled", "quartiles") if "compiled" in rows[0] else ()
    shown = Table("length", "rows", "VQ, ms", "Llama, ms", "Llama / VQ", "quartiles", *more, title=title)
    for row in rows:
        quarters = f"{row['ratio_low']:.2f} - {row['ratio_high']:.2f}"
        times = (f"{row['vq_ms']:,.0f}", f"{row['llama_ms']:,.0f}", f"{row['ratio']:.2f}")
        gain: tuple[str, ...] = ()
        if more:
            low, high = row["compiled_low"], row["compiled_high"]
            gain = (f"{row['compiled_ms']:,.0f}", f"{row['compiled']:.2f}", f"{low:.2f} - {high:.2f}")
        shown.add_row(f"{row['length']:,.0f}", f"{row['rows']:.0f}", *times, quarters, *gain)
    Console().print(shown)
