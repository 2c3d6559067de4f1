"""What is launched compiles for GPUs that are not here: nothing spills, memory suffices, products are matrix ones.

Run with -rP to see registers and shared memory; `compiled.py` prints them for any widths.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from ops.attention.compiled import FLAGS, SHARED, WIDTHS, Compiled, compiled, meta_call, show

KERNELS = tuple(f"{name}_kernel" for name in ("sums", "scan", "forward", "queries", "sweep", "chain", "keys"))
FAST = {
    (90, 128, 128, "plain"): (88, 120, 255, 255, 248, 184, 255),
    (80, 128, 128, "plain"): (112, 112, 216, 192, 176, 80, 192),
    (80, 64, 64, "bias"): (136, 72, 240, 104, 176, 56, 120),
    (90, 64, 64, "rotary"): (248, 104, 144, 208, 224, 96, 176),
}
"""Both architectures and every kind of position; with the registers that each kernel may take: a few more than it did
(triton 3.7.1) when its tile was chosen. More than that, and something was added to the work of every thread.
"""
REST = [x for x in itertools.product((90, 80), WIDTHS, WIDTHS, FLAGS) if x not in FAST]


@pytest.mark.parametrize(
    ("arch", "K", "V", "flags"), [*FAST] + [pytest.param(*x, marks=pytest.mark.slow) for x in REST], ids=str
)
@pytest.mark.timeout(1800)
def test_kernels_fit_the_device(arch, K, V, flags):
    found = compiled(meta_call(K, V, **FLAGS[flags]), arch)
    for x in found:
        print(show(x, arch))
    assert {x.kernel for x in found} == set(KERNELS), "forward and backward"
    assert not [show(x, arch) for x in found if x.faults(arch)]
    most = dict(zip(KERNELS, FAST.get((arch, K, V, flags), [255] * len(KERNELS)), strict=True))
    assert not [show(x, arch) for x in found if x.registers > most[x.kernel]]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("K", "V"), [(64, 64), (24, 40)])
@pytest.mark.parametrize("options", [{"cache": False}, {"gradients": "block"}, {"Hkv": 2, "bias": True}], ids=str)
def test_other_settings_fit_too(arch, K, V, options):
    found = compiled(meta_call(K, V, T=1000, S=200, M=100, dtype=torch.float16, **options), arch)
    assert not [show(x, arch) for x in found if x.faults(arch)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("width", WIDTHS)
def test_kernels_fit_the_generation_after(width):
    found = compiled(meta_call(width, width), 100)
    assert not [show(x, 100) for x in found if x.faults(100)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", [86, 89, 120])
@pytest.mark.parametrize("width", [128, 256])
def test_kernels_fit_a_desktop(arch, width):
    """Its 99 KB of shared memory are enough; a few registers may spill, for which nobody has looked."""
    found = compiled(meta_call(width, width, **FLAGS["all"]), arch)
    assert not [show(x, arch) for x in found if x._replace(spilled=max(0, x.spilled - 32)).faults(arch)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("flags", ["plain", "all"])
def test_single_precision_fits_too(arch, width, flags):
    found = compiled(meta_call(width, width, dtype=torch.float32, **FLAGS[flags]), arch)
    assert not [show(x, arch) for x in found if x.shared > SHARED[arch]], "else it cannot be launched"
    if width < 256:
        assert not [show(x, arch) for x in found if x.spilled]


def test_what_does_not_fit_is_noticed():
    fine = Compiled("forward_kernel", "", 8, 200, 0, 1000, "wgmma")
    assert not fine.faults(90)
    assert fine._replace(spilled=8).faults(90) == ["8 bytes spilled"]
    assert fine._replace(shared=200 * 1024).faults(80) and not fine._replace(shared=200 * 1024).faults(90)
    assert fine._replace(registers=255).resident(90) == 8 and fine._replace(registers=128).resident(90) == 16
    assert not fine._replace(registers=255, warps=4).faults(90)
    assert fine._replace(warps=4, shared=100 * 1024).faults(80) == ["an SM holds 4 warps, not 8"]
    assert fine._replace(warps=16).faults(90) == ["an SM holds 0 warps, not 8"]  # 16 · 32 · 200 > 65,536
    assert fine._replace(product="none").faults(90) == ["no matrix instruction"]
    assert not fine._replace(kernel="scan_kernel", product="none").faults(90)
