"""The machine at hand: its name for tables, and its ceilings, measured: matrix-product FLOP/s and copy bandwidth."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from transformer_vq.bench.turns import in_turns
from transformer_vq.machine import commit, cpu_name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


class Ceilings(NamedTuple):
    """What no kernel here can exceed."""

    flops: float
    """FLOP/s of a large matrix product, in the type of the benchmark where its options name one."""
    bandwidth: float
    """Bytes/s, read and written, of a copy that does not fit into any cache."""


def kind() -> str:
    """cuda | cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def name() -> str:
    """Like `NVIDIA H100` or `Intel(R) Xeon(R) Processor @ 2.50GHz`."""
    if kind() == "cuda":
        return str(torch.cuda.get_device_name())
    return cpu_name()


def about() -> dict[str, Any]:
    """What a number is worth nothing without: device, threads, torch, and the commit of this package."""
    return {
        "device": name(),
        "kind": kind(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def line(facts: dict[str, Any]) -> str:
    """The same in one line."""
    threads = "" if facts["kind"] == "cuda" else f", {facts['threads']} thread{'s' * (facts['threads'] > 1)}"
    at = f", commit {facts['commit']}" if facts["commit"] else ""
    return f"{facts['device']}{threads}, torch {facts['torch']}{at}"


def type_of(options: Mapping[str, Any], usual: str | None) -> torch.dtype | None:
    """That of products in a benchmark with these options; usual: where they say none."""
    named = options.get("precision") or options.get("dtype") or usual
    return None if named is None else DTYPES.get(named)


def ceilings(dtype: torch.dtype | None = None, repeats: int = 5) -> Ceilings:
    """Medians of `repeats`; dtype: fp32 on a CPU, bf16 on a GPU."""
    device = kind()
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    n, numbers = (8192, 2**28) if device == "cuda" else (1536, 2**25)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.ones(numbers, dtype=torch.float32, device=device)
    target, product = torch.empty_like(source), torch.empty_like(a)

    def median(step: Any) -> float:
        return statistics.median(in_turns({"": step}, repeats, device)[""])

    products = median(lambda: torch.mm(a, b, out=product))
    return Ceilings(2 * n**3 / products, 2 * source.nbytes / median(lambda: target.copy_(source)))
