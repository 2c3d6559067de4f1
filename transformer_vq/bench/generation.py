"""Time to generate one token, far into a text and near its start: constant, if the state is.

The calls at both positions take turns in one process; the ratio of their medians is the result.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from transformer_vq.config import TransformerVQConfig
from transformer_vq.models import ModelState, TransformerVQ

PIECE = 4096  # tokens read in one call on the way to a position


def run(
    positions: Sequence[int] = (1024, 65_536), layers: int = 4, width: int = 256, repeats: int = 200
) -> list[dict[str, float]]:
    """-> a row each position: position, milliseconds (median of `repeats` calls), ratio to the first position.

    A gated unit model of fresh weights: one token's work does not depend on what the weights are.
    """
    config = TransformerVQConfig(vocab_size=256, layers=layers, width=width, value_dim=2 * width)
    model = TransformerVQ(config).eval()
    text = torch.randint(256, (1, max(positions)), generator=torch.Generator().manual_seed(0))
    seconds: dict[int, list[float]] = {position: [] for position in positions}
    with torch.inference_mode():
        states = {position: read(model, text[:, :position]) for position in positions}
        with model.frozen():
            for turn in range(repeats + 10):
                for position, state in states.items():
                    start = time.perf_counter()
                    states[position] = model(text[:, turn : turn + 1], state=state).state
                    if turn >= 10:  # the first turns warm up
                        seconds[position].append(time.perf_counter() - start)
    medians = [statistics.median(values) for values in seconds.values()]
    return [
        {"position": position, "milliseconds": 1e3 * median, "ratio": median / medians[0]}
        for position, median in zip(positions, medians, strict=True)
    ]


def read(model: TransformerVQ, tokens: torch.Tensor) -> ModelState:
    """The state after `tokens` (1, T)."""
    state = None
    for piece in tokens.split(PIECE, dim=1):
        state = model(piece, state=state).state
    assert state is not None
    return state


def table(rows: list[dict[str, float]], title: str) -> None:
    """Print the rows."""
    from rich.console import Console
    from rich.table import Table

    shown = Table("position", "ms a token (median)", "ratio", title=title)
    for row in rows:
        shown.add_row(f"{row['position']:,.0f}", f"{row['milliseconds']:.2f}", f"{row['ratio']:.3f}")
    Console().print(shown)
