"""How many FLOP/s a device can do at most: from its maker's data sheet, else as a matrix product here shows.

MFU, the share of it that a model's own operations make, is that of PaLM  [Chowdhery 2204.02311, appendix B].
"""

from __future__ import annotations

import time
from functools import cache
from typing import NamedTuple

import torch

DENSE = {
    "NVIDIA H200": (989.4, 66.9),
    "NVIDIA H100 80GB HBM3": (989.4, 66.9),
    "NVIDIA H100 NVL": (835.0, 60.0),
    "NVIDIA H100 PCIe": (756.0, 51.0),
    "NVIDIA A100": (312.0, 19.5),
    "NVIDIA L40S": (362.0, 91.6),
    "NVIDIA L4": (121.0, 30.3),
}
"""How a name begins: TFLOP/s of dense products in bf16, and in fp32 without TF32."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
LONG_ENOUGH = 0.01  # seconds of a product that is worth timing
SIZES = (512, 1024, 2048, 4096, 8192)
REPEATS = 5


class Peak(NamedTuple):
    """Of one device, in one precision."""

    flops: float
    """FLOP/s."""
    source: str
    """data sheet | measured"""


def peak(device: torch.device, precision: str) -> Peak:
    """precision: fp32 | bf16 | fp64. Measuring takes a fraction of a second, once for a device."""
    if device.type == "cuda":
        known = on_data_sheet(torch.cuda.get_device_name(device), precision)
        if known is not None:
            return Peak(known, "data sheet")
    return Peak(measured(device, precision, torch.get_num_threads()), "measured")


def on_data_sheet(name: str, precision: str) -> float | None:
    """FLOP/s of a GPU of that name; None for one that is not in the table, a part of one (MIG), or with TF32 on."""
    if "MIG" in name or precision not in ("bf16", "fp32"):
        return None
    if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
        return None
    fitting = [known for known in DENSE if name == known or name.startswith((f"{known} ", f"{known}-"))]
    return DENSE[max(fitting, key=len)][precision == "fp32"] * 1e12 if fitting else None


@cache
def measured(device: torch.device, precision: str, threads: int) -> float:
    """FLOP/s of the fastest of a few square products, of a size that takes a while; of `threads` on a CPU."""
    for n in SIZES:
        a = torch.ones(n, n, dtype=DTYPES[precision], device=device)
        seconds = [_timed(a) for _ in range(2)][1]
        if seconds >= LONG_ENOUGH or n == SIZES[-1]:
            break
    return float(2 * n**3 / min(seconds, *(_timed(a) for _ in range(REPEATS))))


def _timed(a: torch.Tensor) -> float:
    began = time.perf_counter()
    product = a @ a
    if product.device.type == "cuda":
        torch.cuda.synchronize(product.device)
    return time.perf_counter() - began
