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

FAST = [(90, 128, 128, "plain")]
REST = [x for x in itertools.product((90, 80), WIDTHS, WIDTHS, FLAGS) if x not in FAST]


@pytest.mark.parametrize(
    ("arch", "K", "V", "flags"), FAST + [pytest.param(*x, marks=pytest.mark.slow) for x in REST], ids=str
)
@pytest.mark.timeout(1800)
def test_kernels_fit_the_device(arch, K, V, flags):
    found = compiled(meta_call(K, V, **FLAGS[flags]), arch)
    for x in found:
        print(show(x, arch))
    assert len(found) == 7, "a call has seven kernels, forward and backward"
    assert not [show(x, arch) for x in found if x.faults(arch)]


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
    fine = Compiled("forward_kernel", "", 200, 0, 1000, "wgmma")
    assert not fine.faults(90)
    assert fine._replace(spilled=8).faults(90) == ["8 bytes spilled"]
    assert fine._replace(shared=200 * 1024).faults(80) and not fine._replace(shared=200 * 1024).faults(90)
    assert fine._replace(product="none").faults(90) == ["no matrix instruction"]
    assert not fine._replace(kernel="scan_kernel", product="none").faults(90)
