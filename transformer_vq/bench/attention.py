"""VQ attention beside PyTorch's own causal attention, forward and backward, on the same queries, keys and values.

Both take turns in one process, so that whatever else the machine does meets both; the ratio is the median over turns.
Peak memory is that of a fresh process, everything in it included.

Axes:  H heads  T length  K width of keys and values  S codes  M window  L block
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from transformer_vq.bench.memory import largest_resident
from transformer_vq.bench.turns import in_turns, ratios
from transformer_vq.ops import vq_attention

LENGTHS = (2048, 8192, 16_384, 32_768, 65_536)
SIZES = {"heads": 4, "width": 64, "codes": 128, "window": 128, "block_len": 128}

Row = dict[str, float | None]


def run(lengths: Sequence[int] = LENGTHS, repeats: int = 5, compare_up_to: int = 32_768, **sizes: int) -> list[Row]:
    """-> a row each length: tokens, vq_ms, sdpa_ms, ratio (sdpa over vq), peak_mib (of VQ attention).

    fp32, one sequence, no positional bias, on the GPU if there is one. `sizes` overrides SIZES. Beyond `compare_up_to`
    tokens the quadratic side would take minutes: its fields are None, as is peak_mib on a GPU's host.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[Row] = []
    for length in lengths:
        vq, full = steps(length, device, **{**SIZES, **sizes})
        contest = {"vq": vq, "sdpa": full} if length <= compare_up_to else {"vq": vq}
        seconds = in_turns(contest, repeats, device)
        ours, theirs = seconds["vq"], seconds.get("sdpa")
        rows.append(
            {
                "tokens": length,
                "vq_ms": 1e3 * statistics.median(ours),
                "sdpa_ms": 1e3 * statistics.median(theirs) if theirs else None,
                "ratio": ratios(theirs, ours)[1] if theirs else None,
                "peak_mib": peak_memory(length, **{**SIZES, **sizes}) if device == "cpu" else None,
            }
        )
    return rows


def table(rows: list[Row], title: str) -> None:
    """Print the rows."""
    from rich.console import Console
    from rich.table import Table

    shown = Table("tokens", "VQ, ms", "SDPA, ms", "SDPA / VQ", "VQ peak memory, MiB", title=title)
    for row in rows:
        forms = (("tokens", ",.0f"), ("vq_ms", ",.0f"), ("sdpa_ms", ",.0f"), ("ratio", ".1f"), ("peak_mib", ",.0f"))
        shown.add_row(*("–" if row[key] is None else format(row[key], form) for key, form in forms))
    Console().print(shown)


def draw(rows: Sequence[Row], where: str) -> Figure:
    """Time over length, both axes logarithmic: a line of slope 1 is linear, one of slope 2 quadratic."""
    figure = Figure(figsize=(6.4, 3.9), layout="constrained")
    axes = figure.add_subplot()
    rows = sorted(rows, key=lambda row: row["tokens"] or 0)
    for key, label, colour in (
        ("sdpa_ms", "full attention (PyTorch's SDPA)", "#c8553d"),
        ("vq_ms", "attention over quantized keys", "#33658a"),
    ):
        known = [row for row in rows if row[key] is not None]
        x, y = ([row[name] or 0.0 for row in known] for name in ("tokens", key))
        axes.plot(x, [ms / 1e3 for ms in y], color=colour, marker="o", markersize=4.5, linewidth=1.8, label=label)
    both = [row for row in rows if row["ratio"]]
    if both:
        at, low, high, ratio = (both[-1][name] or 0.0 for name in ("tokens", "vq_ms", "sdpa_ms", "ratio"))
        axes.annotate("", (at, low / 1e3), (at, high / 1e3), arrowprops={"arrowstyle": "<->", "color": "#6b7280"})
        axes.text(at * 0.93, (low * high) ** 0.5 / 1e3, f"{ratio:.0f}×", ha="right", va="center", color="#1f2937")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} s"))
    axes.set_xlabel("tokens")
    axes.set_title("one attention layer, forward and backward", fontsize=10, color="#6b7280", loc="left")
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    figure.supxlabel(where, fontsize=7, color="#6b7280")
    return figure


def steps(
    length: int, device: str, heads: int, width: int, codes: int, window: int, block_len: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward and backward of VQ attention, and of full attention on the same tensors."""
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(heads, codes, width, generator=generator) * width**-0.5
    z = torch.randint(codes, (1, heads, length), generator=generator)
    k_hat = torch.take_along_dim(codebook[None], z[..., None], dim=2)
    q, v, slope = torch.randn(3, 1, heads, length, width, generator=generator)
    q, k_hat, v, slope, z, codebook = (x.to(device) for x in (q, k_hat, v, slope, z, codebook))
    q, k, v = (x.clone().requires_grad_() for x in (q, k_hat, v))

    def backward(o: Tensor) -> None:
        torch.autograd.grad(o, (q, k, v), slope)

    def vq() -> None:
        backward(vq_attention(q, k, v, z, codebook, window=window, block_len=block_len)[0])

    def full() -> None:
        backward(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0))

    return vq, full


def peak_memory(length: int, **sizes: int) -> float:
    """MiB of a fresh process that does one step, interpreter and PyTorch included."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, length, sizes).result()


def _peak(length: int, sizes: dict[str, int]) -> float:
    vq, _ = steps(length, "cpu", **sizes)
    vq()
    return largest_resident()
