"""A training step of a model with quantized keys beside one of `transformers`' Llama of the same shape, and beside one
of ours with full attention.

Forward, backward, AdamW and the codebooks' update; the same tokens a step at every length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from transformer_vq.bench import work
from transformer_vq.bench.comparison import OURS, Row, Step, able, apart, peak_on_gpu, row
from transformer_vq.bench.device import kind
from transformer_vq.bench.llama import FULL, LLAMA, full, llama, ours
from transformer_vq.bench.turns import in_turns
from transformer_vq.config import ConfigError, TransformerVQConfig
from transformer_vq.models import TransformerVQ
from transformer_vq.models.describe import describe
from transformer_vq.ops.pages import keep_pages

LENGTHS = (512, 4096, 8192)
TOKENS = 8192
"""A step reads so many, in rows of the length at hand; at least one row."""
PRECISIONS = ("fp32", "bf16")
COMPILED = "ours, compiled"
ON_GPU: dict[str, Any] = {
    "lengths": (2048, 8192, 32_768, 131_072), "tokens": 131_072, "shape": "125M", "precision": "bf16",
}  # fmt: skip

TYPE: str | None = "fp32"
"""Of its products, where no option says it; None: fp32 on a CPU, bf16 on a GPU."""
AXIS = "length"
MORE = {
    "rows": ("rows", ",.0f"),
    "tokens_per_s": ("tokens/s", ",.0f"),
    "gflop": ("GFLOP", ",.1f"),
    "peak_mib": ("peak, MiB", ",.0f"),
}


def run(
    lengths: Sequence[int] = LENGTHS,
    repeats: int = 5,
    tokens: int = TOKENS,
    compiled: bool = False,
    shape: str = "small",
    precision: str = "fp32",
    **changes: Any,
) -> list[Row]:
    """-> a row each length, as in `comparison.py`, with rows, tokens_per_s and, on a GPU, peak_mib of ours.

    compiled: the same model under `train.compile` takes part. shape: of `llama.SHAPES`, with `changes`. precision: fp32
    | bf16 (autocast).  Raises ConfigError for other names.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision {precision}: must be one of {', '.join(PRECISIONS)}")
    device = kind()
    keep_pages()  # as the training loop does; for all
    found: list[Row] = []
    for length in lengths:
        batch = max(1, tokens // length)
        model = ours(shape, **changes).to(device)
        sizes = (batch, length, device, precision)
        others = {
            LLAMA: able(partial(beside, llama, llama_step, model.config, *sizes)),
            FULL: able(partial(beside, full, our_step, model.config, *sizes)),
        }
        steps, absent = apart(others)
        mine = our_step(model, *sizes)
        contest: dict[str, Step] = {OURS: mine, **steps}
        if compiled:
            faster = ours(shape, **changes).to(device)
            faster.compile()
            contest[COMPILED] = our_step(faster, *sizes)
        seconds = in_turns(contest, repeats, device)
        flops = describe(model.config, length)["flops_per_token"]
        needed = work.training(flops, batch * length, count(model))
        more = {"peak_mib": peak_on_gpu(mine) if device == "cuda" else None}
        made = row(AXIS, length, seconds, needed, absent, rows=batch, **more)
        made["tokens_per_s"] = batch * length / (made["milliseconds"] / 1e3)
        found.append(made)
    return found


def beside(
    build: Callable[[TransformerVQConfig], Any],
    step: Callable[..., Step],
    config: TransformerVQConfig,
    batch: int,
    length: int,
    device: str,
    precision: str,
) -> Step:
    """A step of another model of this shape, which is built first: it may be that it cannot be."""
    return step(build(config).to(device), batch, length, device, precision)


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def our_step(model: TransformerVQ, batch: int, length: int, device: str, precision: str = "fp32") -> Step:
    """A step of ours, as the training loop takes it."""
    assert model.config.vocab_size is not None
    tokens = text(batch, length, model.config.vocab_size, device)
    optimizer, labels = torch.optim.AdamW(model.parameters()), tokens.roll(-1, 1)

    def step() -> None:
        with autocast(device, precision):
            loss = model(tokens, labels=labels, logits=False).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.apply_codebook_statistics()

    return step


def llama_step(model: nn.Module, batch: int, length: int, device: str, precision: str = "fp32") -> Step:
    """A step of Llama's."""
    tokens = text(batch, length, model.config.vocab_size, device)  # type: ignore[union-attr,arg-type]
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        with autocast(device, precision):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def autocast(device: str, precision: str) -> torch.autocast:
    """As Accelerate does it."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def text(batch: int, length: int, vocab: int, device: str) -> Tensor:
    """Random tokens."""
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
