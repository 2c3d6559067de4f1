"""VQ attention beside other attention, forward and backward, on the same queries, keys and values.

All take turns in one process, so that whatever else the machine does meets all; ratios are medians over turns.
Peak memory is that of a fresh process on a CPU, everything in it included, and on a GPU what a step allocates.

Axes:  B rows  H heads  T length  K width of keys and values  S codes  M window  L block
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch

from transformer_vq.bench import work
from transformer_vq.bench.comparison import OURS, Row, Step, able, apart, peak_on_gpu, row
from transformer_vq.bench.device import kind
from transformer_vq.bench.rivals import RIVALS, Heads
from transformer_vq.bench.turns import in_turns
from transformer_vq.machine import peak_resident
from transformer_vq.ops import nearest, vq_attention
from transformer_vq.ops.attention import resolve_backend
from transformer_vq.ops.attention.block_length import NATIVE, chosen
from transformer_vq.ops.pages import keep_pages

LENGTHS = (2048, 8192, 16_384, 32_768, 65_536)
SIZES = {"heads": 4, "width": 64, "codes": 128, "window": 128}
"""And `block_len`; left out it is chosen, as by `block_len: auto`."""
ON_GPU: dict[str, Any] = {
    "lengths": (4096, 8192, 32_768, 131_072), "compare_up_to": 131_072, "tokens": 131_072, "lookup": True,
    "heads": 8, "width": 128, "codes": 512, "window": 512, "block_len": 512,
}  # fmt: skip

TYPE: str | None = None
"""Of its products, where no option says it; None: fp32 on a CPU, bf16 on a GPU."""
AXIS = "tokens"
MORE = {"rows": ("rows", ",.0f"), "block_len": ("block", ".0f"), "peak_mib": ("peak, MiB", ",.0f")}


def run(
    lengths: Sequence[int] = LENGTHS,
    repeats: int = 5,
    compare_up_to: int = 32_768,
    tokens: int = 1,
    lookup: bool = False,
    **sizes: int,
) -> list[Row]:
    """-> a row each length, as in `comparison.py`, with rows, block_len and peak_mib (of VQ attention).

    fp32 on a CPU, bf16 on a GPU; no bias. tokens: how many all rows hold, at least one row. lookup: our time includes
    that of finding the keys' codes. `sizes` overrides SIZES. Beyond `compare_up_to` tokens of a row, where the
    quadratic sides would take minutes, VQ attention is alone.
    """
    sizes, device = {**SIZES, **sizes}, kind()
    keep_pages()  # as a training run does; for all
    if "block_len" not in sizes:
        K = sizes["width"]
        backend, _ = resolve_backend("auto", device, max(lengths), K, K)
        counted, _ = chosen(device, sizes["codes"], sizes["window"], 1, K, K, two_sided=False)
        sizes["block_len"] = NATIVE if backend == "native" else counted
    found: list[Row] = []
    for length in lengths:
        rows = max(1, tokens // length)
        x, vq = heads(length, device, rows=rows, lookup=lookup, **sizes)
        rivals = RIVALS if length <= compare_up_to else {}
        steps, absent = apart({name: able(partial(make, x)) for name, make in rivals.items()})
        seconds = in_turns({OURS: vq, **steps}, repeats, device)
        shape = (sizes["heads"], length, sizes["width"], sizes["codes"], sizes["window"], sizes["block_len"])
        needed = work.vq_attention(*shape, x.q.itemsize, rows, lookup)
        peak = peak_memory(length, rows=rows, lookup=lookup, **sizes) if device == "cpu" else peak_on_gpu(vq)
        more = {"rows": rows, "block_len": sizes["block_len"], "peak_mib": peak}
        found.append(row(AXIS, length, seconds, needed, absent, **more))
    return found


def heads(
    length: int,
    device: str,
    heads: int,
    width: int,
    codes: int,
    window: int,
    block_len: int,
    rows: int = 1,
    lookup: bool = False,
) -> tuple[Heads, Step]:
    """What all contestants read, (B, H, T, K) each, and a step of VQ attention on it.

    Keys are rows of a codebook. lookup: they lie near rows, and a step of ours begins with finding these.
    """
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    codebook = torch.randn(heads, codes, width, generator=generator) * width**-0.5
    z = torch.randint(codes, (rows, heads, length), generator=generator)
    k = torch.take_along_dim(codebook[None], z[..., None], dim=2)
    q, v, slope = torch.randn(3, rows, heads, length, width, generator=generator)
    if lookup:
        k = k + 0.1 * width**-0.5 * torch.randn(k.shape, generator=generator)
    q, k, v, slope, codebook = (x.to(device, dtype) for x in (q, k, v, slope, codebook))
    z = z.to(device)
    q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
    x = Heads(q, k, v, slope)

    def step() -> None:
        x.backward(vq_attention(x.q, x.k, x.v, z, codebook, window=window, block_len=block_len)[0])

    def from_keys() -> None:
        found = nearest.nearest_code(x.k, codebook)
        k_hat = nearest.lookup(codebook, found).requires_grad_()  # its gradient is the keys' by straight-through
        o = vq_attention(x.q, k_hat, x.v, found, codebook, window=window, block_len=block_len)[0]
        torch.autograd.grad(o, (x.q, k_hat, x.v), x.slope)

    return x, from_keys if lookup else step


def peak_memory(length: int, **sizes: int) -> float:
    """MiB of a fresh process that does one step, interpreter and PyTorch included."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, length, sizes).result()


def _peak(length: int, sizes: dict[str, int]) -> float:
    _, vq = heads(length, "cpu", **sizes)  # type: ignore[arg-type]  # lookup is a bool
    vq()
    return peak_resident() / 2**20
