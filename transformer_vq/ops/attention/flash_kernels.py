"""Flash attention kernels of other libraries, called by their private entries: o with its logsumexp, and gradients for
a softmax that goes on beyond the kernel's own keys.

Row r of Tq queries sees column c of Tk keys where c ≤ r + Tk − Tq and, with a window, c ≥ r + Tk − Tq − window. All
axes are (b, t, h, d): queries' heads are a multiple of keys'. What the backward entries are handed as `o` and `lse` are
those of all keys, here and elsewhere: P = exp(x − lse) and D = Σ dO∘O are then those of the whole softmax.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Grads = tuple[Tensor, Tensor, Tensor]
WIDEST = 256
"""Of queries, keys and values, in every library on CUDA."""


class FlashKernel(Protocol):
    """One library's two entries."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
        """-> o (b, Tq, h, d), and the natural logsumexp (b, h, Tq), fp32 or wider."""

    def backward(
        self, d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, window: int | None
    ) -> Grads:
        """Gradients of q, k and v."""


class OnCPU:
    """PyTorch's flash kernel for processors; takes a mask, and fp64."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
        """As in `FlashKernel`."""
        heads = q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, spread(k, heads), spread(v, heads)))
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=seen(q, k, window), scale=scale
        )
        return o.transpose(1, 2), lse

    def backward(
        self, d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, window: int | None
    ) -> Grads:
        """As in `FlashKernel`."""
        shape, heads = k.shape, q.shape[2] // k.shape[2]
        k, v = spread(k, heads), spread(v, heads)
        d_o, q, k, v, o = (x.transpose(1, 2) for x in (d_o, q, k, v, o))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_o, q, k, v, o, lse, 0.0, False, attn_mask=seen(q, k, window), scale=scale
        )
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        dk, dv = (x.unflatten(2, (shape[2], heads)).sum(3) for x in (dk, dv))
        return dq, dk, dv


class OfPyTorch:
    """PyTorch's own build of flash attention 2 for CUDA."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
        """As in `FlashKernel`."""
        o, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, window is None, False, scale=scale, **sides(window)
        )
        return o, lse

    def backward(
        self, d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, window: int | None
    ) -> Grads:
        """As in `FlashKernel`."""
        state = torch.empty(2, dtype=torch.uint64, device=q.device)  # of a dropout that there is not
        grads: Grads = torch.ops.aten._flash_attention_backward(
            d_o, q, k, v, o, lse, None, None, q.shape[1], k.shape[1], 0.0, window is None, state, state, scale=scale,
            **sides(window),
        )  # fmt: skip
        return grads


class FlashAttention2:
    """The package flash-attn, 2.7 and later."""

    @staticmethod
    def installed() -> bool:
        """Whether it is there; flash-attn 4 alone is a `flash_attn` without these entries."""
        return find_spec("flash_attn") is not None and find_spec("flash_attn.flash_attn_interface") is not None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
        """As in `FlashKernel`."""
        from flash_attn import flash_attn_interface

        o, lse, *_ = flash_attn_interface._flash_attn_forward(
            q, k, v, 0.0, scale, causal=True, **bounds(window), softcap=0.0, alibi_slopes=None, return_softmax=False
        )
        return o, lse

    def backward(
        self, d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, window: int | None
    ) -> Grads:
        """As in `FlashKernel`."""
        from flash_attn import flash_attn_interface

        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        flash_attn_interface._flash_attn_backward(
            d_o, q, k, v, o, lse, dq, dk, dv, 0.0, scale, causal=True, **bounds(window), softcap=0.0,
            alibi_slopes=None, deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return dq, dk, dv


class FlashAttention3:
    """The same authors' kernels for Hopper; there, no bound to the left and 0 to the right is what causal means.

    Entries that are operators name the bounds as we do; before July 2025 they were functions, with a pair for them.
    """

    @staticmethod
    def installed() -> bool:
        """Whether it is there, with these entries."""
        if find_spec("flash_attn_interface") is None:
            return False
        import flash_attn_interface

        entry = flash_attn_interface._flash_attn_forward
        return isinstance(entry, torch.library.CustomOpDef)  # type: ignore[attr-defined]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
        """As in `FlashKernel`."""
        import flash_attn_interface

        o, lse, *_ = flash_attn_interface._flash_attn_forward(q, k, v, softmax_scale=scale, **bounds(window))
        return o, lse

    def backward(
        self, d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, window: int | None
    ) -> Grads:
        """As in `FlashKernel`."""
        import flash_attn_interface

        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        flash_attn_interface._flash_attn_backward(
            d_o, q, k, v, o, lse, dq=dq, dk=dk, dv=dv, softmax_scale=scale, **bounds(window),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return dq, dk, dv


def provider(device: torch.device) -> FlashKernel | None:
    """The kernels for a device: what is installed, newest first, else PyTorch's own; None: there are none."""
    if device.type == "cpu":
        return OnCPU()
    if device.type != "cuda":
        return None
    if FlashAttention3.installed() and torch.cuda.get_device_capability(device)[0] == 9:
        return FlashAttention3()
    if FlashAttention2.installed():
        return FlashAttention2()
    return OfPyTorch() if torch.backends.cuda.is_flash_attention_available() else None


def sides(window: int | None) -> dict[str, int]:
    """A window in PyTorch's words; a causal call has none."""
    return {} if window is None else {"window_size_left": window, "window_size_right": 0}


def bounds(window: int | None) -> dict[str, int]:
    """A window in flash-attn's words."""
    return {"window_size_left": -1 if window is None else window, "window_size_right": 0}


def seen(q: Tensor, k: Tensor, window: int | None) -> Tensor:
    """0 where row r sees column c, else −inf: (Tq, Tk), for q and k (b, h, t, d)."""
    Tq, Tk = q.shape[2], k.shape[2]
    ones = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device)
    hidden = ones.triu(Tk - Tq + 1)
    if window is not None:
        hidden |= ones.tril(Tk - Tq - window - 1)
    return torch.zeros(Tq, Tk, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))


def spread(x: Tensor, heads: int) -> Tensor:
    """(b, t, h, d) -> (b, t, h·heads, d), each head repeated."""
    return x if heads == 1 else x.repeat_interleave(heads, dim=2)


def attend(
    kernel: FlashKernel, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """The kernel's forward entry on keys and values of any widths."""
    width = common_width(q, v)
    V = v.shape[-1]
    q, k, v = (widened(x, width) for x in (q, k, v))
    o, lse = kernel.forward(q, k, v, scale, window)
    return o[..., :V], lse


def gradients(
    kernel: FlashKernel,
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    window: int | None,
) -> Grads:
    """Its backward entry."""
    width, K, V = common_width(q, v), q.shape[-1], v.shape[-1]
    d_o, q, k, v, o = (widened(x, width) for x in (d_o, q, k, v, o))
    dq, dk, dv = kernel.backward(d_o, q, k, v, o, lse.contiguous(), scale, window)
    return dq[..., :K], dk[..., :K], dv[..., :V]


def common_width(q: Tensor, v: Tensor) -> int:
    """Kernels want keys and values of one width, a multiple of 8."""
    return -(-max(q.shape[-1], v.shape[-1]) // 8) * 8


def widened(x: Tensor, width: int) -> Tensor:
    """With zeros up to `width`."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
