"""What `backend: auto` takes, and why in words: one pure function of what a call looks like.

Nothing is measured when it is asked: other backends round otherwise, and a run must go on as it began.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from transformer_vq.config.extras import lack
from transformer_vq.ops.kernels.device import OLDEST

SHORT = 32
"""Up to this many tokens the quadratic form is taken: at 16 it needs 0.7 of block-wise time, at 64 already 1.1."""
FUSED = 256
"""Widest keys and values of the fused kernels."""
FUSED_SINGLE = 64
"""Of their fp32 form, in three TF32 products; wider ones do not fit the registers."""


NARROW = (torch.bfloat16, torch.float16)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


class Look(NamedTuple):
    """What the choice depends on."""

    device: str
    """Its type: cpu, cuda."""
    T: int
    K: int
    V: int
    dtype: torch.dtype
    """What enters the products."""
    arch: int = 0
    """90 for sm_90; 0 without a GPU."""
    triton: bool = False
    """Whether it is installed."""
    linked: bool = False
    """Gradient flows to the state: the fused kernels give it none."""
    native: str | None = ""
    """Why the processor's own kernels are not there, in words; None: they are."""


def choose(x: Look) -> tuple[str, str]:
    """-> the backend's name, and why."""
    if x.T == 1:
        return "recurrent", "one token: O(S + M)"
    if x.T <= SHORT:
        return "quadratic", f"{x.T} tokens, at most {SHORT}: one small product beats walking blocks"
    if x.device == "cpu" and x.native is None:
        return "native", f"compiled for this processor, linear in T, the fastest here for {x.T} tokens"
    if x.device != "cuda":
        why = f"; nothing is compiled for this processor: {x.native}" if x.native else ""
        return "blockwise", f"linear in T, {x.T} tokens on {x.device}{why}"
    name, narrow, widest = NAMES.get(x.dtype, "?"), x.dtype in NARROW, max(x.K, x.V)
    kernels = x.triton and x.arch >= OLDEST
    if x.linked:
        taken = "wide" if narrow else "blockwise"
        return (
            taken,
            f"a piece of a split sequence in {name}: fused kernels give its state no gradient",
        )
    if narrow and x.V > FUSED:
        return "wide", f"values are {x.V} wide, more than {FUSED}: {name} products over many blocks at once"
    if narrow and widest <= FUSED and kernels:
        return "triton", f"fused kernels for {name}, {x.T} tokens"
    if x.dtype == torch.float32 and widest <= FUSED_SINGLE and x.arch >= 90 and kernels:
        return "triton", f"fused kernels for {name} up to {FUSED_SINGLE} wide, {x.T} tokens"
    if not x.triton:
        why = lack("triton", "a fused kernel")
    elif not kernels:
        why = f"fused kernels begin with sm_{OLDEST}, and this GPU is sm_{x.arch}"
    elif narrow:
        why = f"keys are {x.K} wide, and fused kernels hold at most {FUSED}"
    elif x.dtype == torch.float32:
        why = f"{name} products: fused kernels would take more registers than there are, unless on sm_90 up to 64 wide"
    else:
        why = f"fused kernels do not take {name}"
    return "blockwise", f"linear in T; {why}"
