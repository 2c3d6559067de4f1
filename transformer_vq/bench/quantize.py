"""Our quantizer beside `VectorQuantize(rotation_trick=True)` of vector-quantize-pytorch: time and memory of one step.

A step is lookup, estimator, statistics and one application of the moving averages, forward and backward, on the same
keys. Times are medians of runs that take turns in one process; memory, on a GPU its own, is that of a fresh
process each.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence

import torch
from torch import nn

from transformer_vq.bench import work
from transformer_vq.bench.comparison import OURS, Row, row
from transformer_vq.bench.device import kind
from transformer_vq.bench.turns import in_turns
from transformer_vq.config.extras import need
from transformer_vq.machine import peak_resident
from transformer_vq.quantizers import build_quantizer

Step = Callable[[], None]
THEIRS = "vector-quantize-pytorch"

TYPE: str | None = "fp32"
"""Of its products, where no option says it; None: fp32 on a CPU, bf16 on a GPU."""
AXIS = "vectors"
MORE = {"peak_mib": ("peak, MiB", ",.0f")}


def run(
    vectors: Sequence[int] = (4096, 16_384, 65_536),
    dim: int = 128,
    codes: int = 512,
    estimator: str = "rotation",
    repeats: int = 7,
    device: str | None = None,
) -> list[Row]:
    """-> a row each number of keys, as in `comparison.py`, with peak_mib of either side, beyond the keys.

    In fp32, one head; `device` is the GPU where there is one, else the CPU.
    Raises ConfigError when the other package is not installed.
    """
    need("vector_quantize_pytorch", "bench quantize")
    device = device or kind()
    found = []
    for n in vectors:
        arguments = (n, dim, codes, estimator, device)
        seconds = in_turns({name: build(*arguments) for name, build in BUILDERS.items()}, repeats, device)
        made = row(AXIS, n, seconds, work.quantizer(n, dim, codes), {}, peak_mib=peak_memory(OURS, *arguments))
        made["others"][THEIRS]["peak_mib"] = peak_memory(THEIRS, *arguments)
        found.append(made)
    return found


def peak_memory(name: str, *arguments: object) -> float:
    """MiB that one step adds to the peak of a fresh process that holds module, keys and gradient, and has done one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name, arguments))


def _peak(name: str, arguments: tuple[int, int, int, str, str]) -> float:
    BUILDERS[name](64, *arguments[1:])()  # what is loaded by the first step is no part of it
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
    OURS: _ours,
    THEIRS: _theirs,
}
