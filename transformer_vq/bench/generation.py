"""Time to generate one token, near the start of a text and far into it: constant, if the state is.

Beside it Llama's, which reads all keys and values so far.

The calls at all positions take turns in one process. One token's work does not depend on what the weights are.
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
from transformer_vq.bench.turns import in_turns, quartiles, ratios
from transformer_vq.models import ModelState, TransformerVQ
from transformer_vq.models.describe import describe

PIECE = 4096  # tokens read in one call on the way to a position

AXIS = "position"

Row = dict[str, Any]


def run(
    positions: Sequence[int] = (1024, 16_384, 65_536), repeats: int = 200, compare_up_to: int = 16_384, **changes: Any
) -> list[Row]:
    """-> a row each position: position, milliseconds (median of `repeats` calls), ratio to the first position's,
    llama_ms and llama_ratio (Llama over ours, median over turns), None beyond `compare_up_to`; low and high, our
    quartiles; mib and gflop, what a token of ours must read and compute.
    `changes` to the model of `llama.SHAPE`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ours(**changes).to(device).eval()
    text = torch.randint(256, (1, max(positions)), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        contest: dict[str, Callable[[], object]] = {f"vq {p}": vq_token(model, text[:, :p]) for p in positions}
        compared = [position for position in positions if position <= compare_up_to]
        if compared:
            other = llama(model.config).to(device).eval()
            contest |= {f"llama {p}": llama_token(other, text[:, :p]) for p in compared}
        with model.frozen(in_place=True):  # as `generate` does; no state here is gone on from twice
            seconds = in_turns(contest, repeats, device, warmup=10)
    rows: list[Row] = []
    about = describe(model.config, max(positions))
    needed = work.token(about["flops_per_token"], about["parameters"], about["state_bytes"])
    first = statistics.median(seconds[f"vq {positions[0]}"])
    for position in positions:
        mine, theirs = seconds[f"vq {position}"], seconds.get(f"llama {position}")
        rows.append(
            {
                "position": position,
                "milliseconds": 1e3 * statistics.median(mine),
                "ratio": statistics.median(mine) / first,
                "llama_ms": 1e3 * statistics.median(theirs) if theirs else None,
                "llama_ratio": ratios(theirs, mine)[1] if theirs else None,
                "low": 1e3 * quartiles(mine)[0],
                "high": 1e3 * quartiles(mine)[2],
                "mib": needed.bytes / 2**20,
                "gflop": needed.flops / 1e9,
            }
        )
    return rows


def lines(rows: list[Row]) -> dict[str, list[tuple[float, float, float, float]]]:
    """For the picture, by implementation: position and seconds."""
    ours = [(r["position"], r["low"] / 1e3, r["milliseconds"] / 1e3, r["high"] / 1e3) for r in rows]
    theirs = [(r["position"], *[r["llama_ms"] / 1e3] * 3) for r in rows if r["llama_ms"] is not None]
    return {"quantized keys": ours, "Llama": theirs}


def floor(rows: list[Row], ceilings: Ceilings) -> list[tuple[float, float]]:
    """Position, and the least seconds that reading weights and state takes."""
    return [(r["position"], work.Work(1e9 * r["gflop"], 2**20 * r["mib"]).seconds(*ceilings)) for r in rows]


def vq_token(model: TransformerVQ, text: Tensor) -> Callable[[], None]:
    """A call of one token after `text` (1, T), the state carried on."""
    state = read(model, text)

    def step() -> None:
        nonlocal state
        state = model(text[:, :1], state=state).state

    return step


def llama_token(model: nn.Module, text: Tensor) -> Callable[[], None]:
    """The same of Llama, whose cache grows by the token."""
    cache = None
    for piece in text.split(PIECE, dim=1):
        cache = model(piece, cache=cache, use_cache=True, logits_to_keep=1).cache

    def step() -> None:
        model(text[:, :1], cache=cache, use_cache=True)

    return step


def read(model: TransformerVQ, tokens: Tensor) -> ModelState:
    """The state after `tokens` (1, T)."""
    state: ModelState | None = None
    for piece in tokens.split(PIECE, dim=1):
        state = model(piece, state=state, logits=False).state
    assert state is not None
    return state


def table(rows: list[Row], title: str) -> None:
    """Print the rows."""
    from rich.console import Console
    from rich.table import Table

    shown = Table("position", "ms a token (median)", "to the first", "Llama, ms", "Llama / VQ", title=title)
    forms = {"position": ",.0f", "milliseconds": ".2f", "ratio": ".3f", "llama_ms": ".2f", "llama_ratio": ".2f"}
    for row in rows:
        shown.add_row(*("–" if row[key] is None else format(row[key], form) for key, form in forms.items()))
    Console().print(shown)
