"""Time to generate one token, near the start of a text and far into it: constant, if the state is.

Beside it Llama's, and ours with full attention, which read all keys and values so far.

The calls at all positions take turns in one process. One token's work does not depend on what the weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from transformer_vq.bench import work
from transformer_vq.bench.comparison import OURS, Row, Step, able, apart, row
from transformer_vq.bench.device import kind
from transformer_vq.bench.llama import FULL, LLAMA, full, llama, ours
from transformer_vq.bench.turns import in_turns
from transformer_vq.config import ConfigError, TransformerVQConfig
from transformer_vq.models import ModelState, TransformerVQ
from transformer_vq.models.describe import DTYPES, describe

PIECE = 4096  # tokens read in one call on the way to a position
ON_GPU: dict[str, Any] = {
    "positions": (1000, 1_000_000), "compare_up_to": 1000, "shape": "125M", "dtype": "bf16",
}  # fmt: skip

TYPE: str | None = "fp32"
"""Of its products, where no option says it; None: fp32 on a CPU, bf16 on a GPU."""
AXIS = "position"
MORE = {"to_first": ("to the first", ".3f"), "mib": ("read, MiB", ",.1f")}


def run(
    positions: Sequence[int] = (1024, 16_384, 65_536),
    repeats: int = 200,
    compare_up_to: int = 16_384,
    shape: str = "small",
    dtype: str = "fp32",
    **changes: Any,
) -> list[Row]:
    """-> a row each position, as in `comparison.py`, with to_first, the median over the first position's.

    Beyond `compare_up_to` ours is alone. shape: of `llama.SHAPES`, with `changes`. dtype: fp32 | bf16 | fp64, of
    weights and state.  Raises ConfigError for other names.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}")
    device = kind()
    model = ours(shape, **changes).to(device, DTYPES[dtype]).eval()
    vocab, draw = model.config.vocab_size or 0, torch.Generator().manual_seed(0)
    text = torch.randint(vocab, (1, max(positions)), generator=draw).to(device)
    compared = [p for p in positions if p <= compare_up_to]
    with torch.inference_mode():
        states = {p: read(model, text[:, :p]) for p in positions}
        sides: dict[tuple[str, int], Step | str] = {
            (OURS, p): our_token(model, text[:, :1], state) for p, state in states.items()
        }
        for name, build, token in ((LLAMA, llama, llama_token), (FULL, full, full_token)):
            for p in compared:
                sides[name, p] = able(partial(beside, build, token, model.config, text[:, :p], DTYPES[dtype]))
        steps, absent = apart(sides)
        with model.frozen(in_place=True):  # as `generate` does; no state here is gone on from twice
            seconds = in_turns(steps, repeats, device, warmup=10)
    about = describe(model.config, max(positions))
    weights = about["parameters"] - (0 if model.config.tied_embedding else about["embedding_parameters"])
    found: list[Row] = []
    for p, state in states.items():
        held = sum(x.nbytes for layer in state.layers for x in layer)
        needed = work.token(about["flops_per_token"], DTYPES[dtype].itemsize * weights, held)
        made = row(AXIS, p, _at(p, seconds), needed, _at(p, absent))
        made["to_first"] = made["milliseconds"] / (found[0] if found else made)["milliseconds"]
        found.append(made)
    return found


def _at(position: int, by_side: Mapping[tuple[str, int], Any]) -> dict[str, Any]:
    """Of one position, by name."""
    return {name: x for (name, p), x in by_side.items() if p == position}


def beside(
    build: Callable[[TransformerVQConfig], Any],
    token: Callable[..., Step],
    config: TransformerVQConfig,
    text: Tensor,
    dtype: torch.dtype,
) -> Step:
    """A token of another model of this shape after `text`; it is built first, which it may be that it cannot be."""
    return token(build(config).to(text.device, dtype).eval(), text)


def our_token(model: TransformerVQ, token: Tensor, state: ModelState | None) -> Step:
    """A call of one token (1, 1), the state carried on."""

    def step() -> None:
        nonlocal state
        state = model(token, state=state).state

    return step


def full_token(model: TransformerVQ, text: Tensor) -> Step:
    """The same after `text` (1, T), by a model that keeps every key."""
    return our_token(model, text[:, :1], read(model, text))


def llama_token(model: nn.Module, text: Tensor) -> Step:
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
