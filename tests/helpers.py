"""What several tests share: the word "same", and small random inputs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor], rtol: float) -> None:
    """Each tensor of `got` equals its namesake in `want` to `rtol` of the largest entry; NaN fails."""
    assert got.keys() == want.keys()
    for name, w in want.items():
        g = got[name]
        assert g.shape == w.shape, f"{name}: {tuple(g.shape)} instead of {tuple(w.shape)}"
        if w.numel() == 0:
            continue
        error = (g - w).abs().max() / w.abs().max().clamp_min(1e-30)
        assert error <= rtol, f"{name} {tuple(w.shape)}: relative error {error:.1e} > {rtol:.0e}"


def timeless(record: dict) -> dict:
    """A record of a run without what depends on the clock and the machine."""
    return {key: value for key, value in record.items() if not key.endswith("_per_s") and "cost/" not in key}
