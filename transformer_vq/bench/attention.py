"""VQ attention beside other attention, forward and backward, on the same queries, keys and values.

All take turns in one process, so that whatever else the machine does meets all; ratios are medians over turns.
Peak memory is that of a fresh process, everything in it included.

Axes:  H heads  T length  K width of keys and values  S codes  M window  L block
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from transformer_vq.bench import work
from transformer_vq.bench.device import Ceilings, kind
from transformer_vq.bench.rivals import RIVALS, Heads, able
from transformer_vq.bench.turns import in_turns, quartiles, ratios
from transformer_vq.machine import peak_resident
from transformer_vq.ops import vq_attention
from transformer_vq.ops.attention import resolve_backend
from transformer_vq.ops.attention.block_length import NATIVE, chosen
from transformer_vq.ops.pages import keep_pages

LENGTHS = (2048, 8192, 16_384, 32_768, 65_536)
SIZES = {"heads": 4, "width": 64, "codes": 128, "window": 128}
"""And `block_len`; left out it is chosen, as by `block_len: auto`."""

AXIS = "tokens"

Row = dict[str, Any]


def run(lengths: Sequence[int] = LENGTHS, repeats: int = 5, compare_up_to: int = 32_768, **sizes: int) -> list[Row]:
    """-> a row each length: tokens, block_len, vq_ms, sdpa_ms, ratio (sdpa over vq), peak_mib (of VQ attention), …

    and quartiles (vq_low, vq_high, ratio_low, ratio_high), gflop and mib (of VQ attention, by `work.py`), `others`: by
    name milliseconds and ratio, or why a rival is absent. fp32 on a CPU, bf16 on a GPU; one sequence, no bias. `sizes`
    overrides SIZES. Beyond `compare_up_to` tokens the quadratic side would take minutes: its fields are None, as is
    peak_mib on a GPU's host.
    """
    sizes, device = {**SIZES, **sizes}, kind()
    keep_pages()  # as a training run does; for all
    if "block_len" not in sizes:
        K = sizes["width"]
        backend, _ = resolve_backend("auto", device, max(lengths), K, K)
        counted, _ = chosen(device, sizes["codes"], sizes["window"], 1, K, K, two_sided=False)
        sizes["block_len"] = NATIVE if backend == "native" else counted
    rows: list[Row] = []
    for length in lengths:
        x, vq = heads(length, device, **sizes)
        others = {name: able(make, x) for name, make in RIVALS.items()} if length <= compare_up_to else {}
        contest: dict[str, Callable[[], object]] = {"vq": vq}
        contest |= {name: step for name, step in others.items() if callable(step)}
        seconds = in_turns(contest, repeats, device)
        ours, theirs = seconds["vq"], seconds.get("sdpa")
        spread = ratios(theirs, ours) if theirs else (None,) * 3
        low, median, high = quartiles(ours)
        needed = work.vq_attention(
            sizes["heads"], length, sizes["width"], sizes["codes"], sizes["window"], sizes["block_len"], x.q.itemsize
        )
        rows.append(
            {
                "tokens": length,
                "block_len": sizes["block_len"],
                "vq_ms": 1e3 * median,
                "vq_low": 1e3 * low,
                "vq_high": 1e3 * high,
                "sdpa_ms": 1e3 * statistics.median(theirs) if theirs else None,
                "ratio": spread[1],
                "ratio_low": spread[0],
                "ratio_high": spread[2],
                "peak_mib": peak_memory(length, **sizes) if device == "cpu" else None,
                "gflop": needed.flops / 1e9,
                "mib": needed.bytes / 2**20,
                "others": {name: _of(seconds.get(name), ours, why) for name, why in others.items() if name != "sdpa"},
            }
        )
    return rows


def _of(theirs: list[float] | None, ours: list[float], why: object) -> Row:
    if theirs is None:
        return {"absent": str(why)}
    return {"ms": 1e3 * statistics.median(theirs), "ratio": ratios(theirs, ours)[1]}


def table(rows: list[Row], title: str) -> None:
    """Print the rows, and who is absent."""
    from rich.console import Console
    from rich.table import Table

    shown = Table("tokens", "VQ, ms", "SDPA, ms", "SDPA / VQ", "VQ peak memory, MiB", title=title)
    for row in rows:
        forms = (("tokens", ",.0f"), ("vq_ms", ",.1f"), ("sdpa_ms", ",.1f"), ("ratio", ".1f"), ("peak_mib", ",.0f"))
        shown.add_row(*("–" if row[key] is None else format(row[key], form) for key, form in forms))
    Console().print(shown)
    for name, found in {name: f for row in rows for name, f in row.get("others", {}).items()}.items():
        Console().print(
            f"{name}: absent, {found['absent']}" if "absent" in found else f"{name}: {found['ratio']:.1f} × ours"
        )


def lines(rows: list[Row]) -> dict[str, list[tuple[float, float, float, float]]]:
    """For the picture, by implementation: tokens and seconds."""
    ours = [(r["tokens"], r["vq_low"] / 1e3, r["vq_ms"] / 1e3, r["vq_high"] / 1e3) for r in rows]
    sdpa = [(r["tokens"], *[r["sdpa_ms"] / 1e3] * 3) for r in rows if r["sdpa_ms"] is not None]
    found = {"VQ attention": ours, "SDPA": sdpa}
    for name in RIVALS:
        points = [
            (r["tokens"], *[r["others"][name]["ms"] / 1e3] * 3) for r in rows if "ms" in r["others"].get(name, {})
        ]
        if points:
            found[name] = points
    return found


def floor(rows: list[Row], ceilings: Ceilings) -> list[tuple[float, float]]:
    """Tokens, and the least seconds that VQ attention could take."""
    return [(r["tokens"], work.Work(1e9 * r["gflop"], 2**20 * r["mib"]).seconds(*ceilings)) for r in rows]


def heads(
    length: int, device: str, heads: int, width: int, codes: int, window: int, block_len: int
) -> tuple[Heads, Callable[[], None]]:
    """What all contestants read, and a step of VQ attention on it."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    codebook = torch.randn(heads, codes, width, generator=generator) * width**-0.5
    z = torch.randint(codes, (1, heads, length), generator=generator)
    k_hat = torch.take_along_dim(codebook[None], z[..., None], dim=2)
    q, v, slope = torch.randn(3, 1, heads, length, width, generator=generator)
    q, k_hat, v, slope, codebook = (x.to(device, dtype) for x in (q, k_hat, v, slope, codebook))
    z = z.to(device)
    q, k, v = (t.clone().requires_grad_() for t in (q, k_hat, v))
    x = Heads(q, k, v, slope)

    def vq() -> None:
        x.backward(vq_attention(x.q, x.k, x.v, z, codebook, window=window, block_len=block_len)[0])

    return x, vq


def peak_memory(length: int, **sizes: int) -> float:
    """MiB of a fresh process that does one step, interpreter and PyTorch included."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, length, sizes).result()


def _peak(length: int, sizes: dict[str, int]) -> float:
    _, vq = heads(length, "cpu", **sizes)
    vq()
    return peak_resident() / 2**20
