"""What the kernels of a call compile to, for GPUs that are not here: registers, spills, shared memory.

    PYTHONPATH=.:tests python tests/ops/attention/compiled.py [90] [128x128] [plain]

prints a table, one row a kernel.

A call on the meta device goes through the backend as it would on a GPU, and every launch stops after the compiler: what
is compiled is what is launched, with its strides and its settings. Needs triton, no GPU, no CUDA toolkit.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from transformer_vq.ops.attention import triton as fused
from transformer_vq.ops.attention.arguments import Arguments
from transformer_vq.ops.attention.call import Call, prepare
from transformer_vq.ops.attention.state import initial_state

SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that a block may have; an SM has 1 KB more, and keeps as much of it for every block."""
REGISTERS = 64 * 1024
"""Of an SM, whichever of these; a thread gets them by eights."""
WARPS = 8
"""That an SM must hold, two for each of its four units: one of them waits while the other multiplies."""
FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "rotary": {"rotary": True},
    "all": {"bias": True, "rotary": True, "segments": True, "carried": True},
}
SUMS = ("scan_kernel", "chain_kernel", "write_kernel")
"""Kernels without a product."""
WIDTHS = (64, 128, 256)


class Compiled(NamedTuple):
    """One kernel for one device."""

    kernel: str
    tile: str
    warps: int
    """A block's."""
    registers: int
    """A thread's."""
    spilled: int
    """Bytes a thread; `cuobjdump` calls it STACK."""
    shared: int
    """Bytes a block."""
    product: str
    """The matrix instruction: wgmma, mma.sync, tcgen05 or none."""

    def faults(self, arch: int) -> list[str]:
        """What keeps it from running well, or at all."""
        found = [f"{self.spilled} bytes spilled"] if self.spilled else []
        found += [f"{self.shared} bytes of shared memory"] if self.shared > SHARED[arch] else []
        resident = self.resident(arch)
        found += [f"an SM holds {resident} warps, not {WARPS}"] if resident < WARPS else []
        found += ["no matrix instruction"] if self.product == "none" and self.kernel not in SUMS else []
        return found

    def resident(self, arch: int) -> int:
        """Warps that registers and shared memory of an SM are enough for."""
        by_registers = REGISTERS // (32 * self.warps * -(-self.registers // 8) * 8)
        by_memory = (SHARED[arch] + 1024) // (self.shared + 1024)
        return self.warps * min(by_registers, by_memory)


class NoDevice:
    """A driver of a device that is not here; its number is its architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def launches(arch: int) -> Iterator[list[tuple[str, Any, dict[str, Any]]]]:
    """Names, compiled kernels and named arguments of what is launched inside, for sm_<arch>; nothing runs."""
    made: list[tuple[str, Any, dict[str, Any]]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        made.append((self.fn.__name__, kernel, kwargs))
        return kernel

    before = driver._active
    driver.set_active(NoDevice(arch))  # type: ignore[arg-type]
    try:
        with patch.object(JITFunction, "run", compile_only):
            yield made
    finally:
        driver._active = before


def meta_call(
    K: int, V: int, *, dtype: torch.dtype = torch.bfloat16, T: int = 4096, S: int = 512, M: int = 512, B: int = 2,
    H: int = 8, Hkv: int = 8, bias: bool = False, rotary: bool = False, segments: bool = False, carried: bool = False,
    **options: Any,
) -> Call:  # fmt: skip
    """A call whose tensors have shapes, types and strides alone; heads lie beside time, as projections leave them."""

    def heads(n: int, width: int) -> torch.Tensor:
        return torch.empty(B, T, n, width, dtype=dtype, device="meta").transpose(1, 2)

    return prepare(
        Arguments(
            heads(H, K),
            heads(Hkv, K),
            heads(Hkv, V),
            torch.empty(B, Hkv, T, dtype=torch.int64, device="meta"),
            torch.empty(Hkv, S, K, dtype=torch.float32, device="meta"),
            window=M,
            block_len=512,
            scale=0.125,
            bias=torch.empty(B, H, T, M + 1, dtype=dtype, device="meta") if bias else None,
            rotary=torch.empty(K // 2, device="meta") if rotary else None,
            segments=torch.empty(B, T, dtype=torch.int64, device="meta") if segments else None,
            state=initial_state(B, Hkv, K, V, S, M, dtype, "meta") if carried else None,
            backend="triton",
            **options,
        )
    )


def measure(kernel: Any) -> tuple[int, int, int, str]:
    """Registers, spilled bytes, shared memory and matrix instruction of a compiled kernel."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", said).groups())  # type: ignore[union-attr]
    product = next((k for k in ("wgmma", "tcgen05", "mma.sync") if k in kernel.asm["ptx"]), "none")
    return registers, stack, kernel.metadata.shared, product


def compiled(call: Call, arch: int, backward: bool = True) -> list[Compiled]:
    """Every kernel of a call, forward and backward, for sm_<arch>."""
    found = {}
    with (
        launches(arch) as made,
        patch.object(fused, "refusal", lambda device: None),
        patch.object(fused, "architecture", lambda device: arch),
    ):
        call = call.with_leaves() if backward else call
        o = fused.triton_attention(call)
        if backward:
            torch.autograd.grad(o.sum(), call.learned())
    for launch in made:
        row = as_row(*launch)
        found[row.kernel] = row
    return list(found.values())


def as_row(name: str, kernel: Any, given: dict[str, Any]) -> Compiled:
    """One launch, measured."""
    sizes = "".join(f"{k}{given[k]} " for k in ("BM", "BN", "BS", "BJ") if k in given)
    how = f"w{kernel.metadata.num_warps} s{kernel.metadata.num_stages}"
    return Compiled(name, sizes + how, kernel.metadata.num_warps, *measure(kernel))


def show(x: Compiled, arch: int) -> str:
    """One line."""
    said = f"sm_{arch} {x.kernel:15} {x.tile:18} {x.registers:4} registers {x.spilled:4} spilled"
    return f"{said} {x.shared / 1024:4.0f} KB {x.product:9} {', '.join(x.faults(arch))}"


def main(words: list[str]) -> None:
    """Words are architectures, widths KxV and names in FLAGS; of what is not named, all."""
    archs = [int(w) for w in words if w.isdigit()] or [90, 80]
    widths = [tuple(map(int, w.split("x"))) for w in words if re.fullmatch(r"\d+x\d+", w)]
    flags = [w for w in words if w in FLAGS] or list(FLAGS)
    for arch, (K, V), name in itertools.product(archs, widths or itertools.product(WIDTHS, WIDTHS), flags):
        for x in compiled(meta_call(K, V, **FLAGS[name]), arch):
            print(f"K{K} V{V} {name:6}", show(x, arch), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
