"""Our quantizer beside `VectorQuantize(rotation_trick=True)` of vector-quantize-pytorch: time and memory of one step.

A step is lookup, estimator, statistics and one application of the moving averages, forward and backward, on the same
keys. Times are medians of runs that take turns in one process; memory, on a GPU its own, is that of a fresh
process each.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import torch
from torch import nn

from transformer_vq.bench.device import kind
from transformer_vq.bench.turns import in_turns, quartiles, ratios, shown_speedup, spread
from transformer_vq.config.extras import need
from transformer_vq.machine import peak_resident
from transformer_vq.quantizers import build_quantizer

Step = Callable[[], None]


def run(
    vectors: int = 65_536,
    dim: int = 128,
    codes: int = 512,
    estimator: str = "rotation",
    repeats: int = 7,
    device: str | None = None,
) -> list[dict[str, str | float]]:
    """-> a row each for ours and theirs: implementation, milliseconds, peak_mib (beyond the keys), speedup over theirs,
    and quartiles (low, high; speedup_low, speedup_high).

    In fp32, one head; `device` is the GPU where there is one, else the CPU.
    Raises ConfigError when the other package is not installed.
    """
    need("vector_quantize_pytorch", "bench quantize")
    device = device or kind()
    arguments = (vectors, dim, codes, estimator, device)
    steps = {name: build(*arguments) for name, build in BUILDERS.items()}
    seconds = in_turns(steps, repeats, device)
    theirs = seconds["vector-quantize-pytorch"]
    return [
        {
            "implementation": name,
            **spread("milliseconds", "low", "high", quartiles([1e3 * t for t in seconds[name]])),
            "peak_mib": peak_memory(name, *arguments),
            **spread("speedup", "speedup_low", "speedup_high", ratios(theirs, seconds[name])),
        }
        for name in steps
    ]


def table(rows: list[dict[str, str | float]], title: str) -> None:
    """Print the rows."""
    from rich.console import Console
    from rich.table import Table

    shown = Table("implementation", "ms (median)", "peak memory, MiB", "speed over theirs", "quartiles", title=title)
    for row in rows:
        numbers = f"{row['milliseconds']:.0f}", f"{row['peak_mib']:.0f}", *shown_speedup(row)
        shown.add_row(str(row["implementation"]), *numbers)
    Console().print(shown)


def peak_memory(name: str, *arguments: object) -> float:
    """MiB that one step adds to the peak of a fresh process that holds module, keys and gradient."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name, arguments))


def _peak(name: str, arguments: tuple[int, int, int, str, str]) -> float:
    step = BUILDERS[name](*arguments)
    peak = torch.cuda.max_memory_allocated if arguments[-1] == "cuda" else peak_resident
    before = peak() / 2**20
    step()
    return peak() / 2**20 - before


def _ours(vectors: int, dim: int, codes: int, estimator: str, device: str) -> Step:
    module = build_quantizer({"kind": "vq", "codes": codes, "estimator": estimator}, heads=1, dim=dim).to(device)
    keys, slope = _inputs((1, 1, vectors, dim), device)

    def step() -> None:
        keys.grad = None
        out = module(keys)
        torch.autograd.backward([out.quantized, out.loss], [slope, torch.ones_like(out.loss)])
        module.apply_codebook_statistics()

    return step


def _theirs(vectors: int, dim: int, codes: int, estimator: str, device: str) -> Step:
    """The package's own rotation whatever `estimator` is: the yardstick stays the same."""
    from vector_quantize_pytorch import VectorQuantize

    module: nn.Module = VectorQuantize(dim=dim, codebook_size=codes, rotation_trick=True, decay=0.99).to(device)
    keys, slope = _inputs((1, vectors, dim), device)

    def step() -> None:
        keys.grad = None
        quantized, _, loss = module(keys)
        torch.autograd.backward([quantized, loss.sum()], [slope, torch.ones((), device=device)])

    return step


def _inputs(shape: tuple[int, ...], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and the gradient that comes back to them, normal numbers."""
    generator = torch.Generator().manual_seed(0)
    keys, slope = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    return keys.requires_grad_(), slope


BUILDERS: dict[str, Callable[[int, int, int, str, str], Step]] = {
    "transformer_vq": _ours,
    "vector-quantize-pytorch": _theirs,
}
