"""Quadratic VQ attention: the definition. O(T²); every other backend is tested against it.

    logit(i,j) = q_i·k̂_j + [i−j ≤ M] bias(i, i−j),   j ≤ i,   softmax over j, times v_j        [Lingle 2309.16354]

What came before this call is M carried keys and, per code, a count n_s and a mean value m_s of the older ones: logit
q_i·c_s + log n_s, value m_s.

Axes:  B batch  Hkv key heads  G queries a key head  T length  K, V widths  S codes  M window  L block length
"""

from __future__ import annotations

import torch
from torch import Tensor

from transformer_vq.ops.attention.call import Call
from transformer_vq.ops.attention.rotary import positioned


def quadratic(call: Call) -> Tensor:
    """`Call` -> o (B, Hkv, G, T, V)."""
    call = call.wide()
    M, T = call.window, call.q.shape[-2]
    _, v_live = gradient_rule(call, *places(M, T, call.q.device))
    p_cached, p = probabilities(call)
    o = weighted(p, call.v_with_carried[:, :, None], v_live)
    mean = call.state.mean if call.grad_through_cache else call.state.mean.detach()
    return p_cached @ mean[:, :, None] + o if call.cache else o


def probabilities(call: Call) -> tuple[Tensor, Tensor]:
    """A wide `Call` -> what each query pays to the codes of the carried cache, and to each carried and own key.

    (B, Hkv, G, T, S), S = 0 without a cache, and (B, Hkv, G, T, M+T); the two together sum to one.
    """
    M, T = call.window, call.q.shape[-2]
    i, j = places(M, T, call.q.device)
    inside = i - j <= M
    same_document = call.query_run[:, :, None] == call.key_run[:, None]  # (B, T, M+T)
    seen = same_document & (j <= i) & (inside | call.cache)
    k_live, _ = gradient_rule(call, i, j)

    q, q_far, k = positioned(call)
    near = inner(q, k[:, :, None], k_live)
    far = inner(q_far, call.k_beyond_window[:, :, None], k_live)
    logits = torch.where(inside, near, far)
    if call.bias is not None:
        bias = call.bias.expand(-1, -1, -1, T, -1)
        distance = (i - j).clamp(0, M).expand(*bias.shape[:3], T, M + T)
        logits = logits + torch.where(inside, bias.gather(-1, distance), 0)
    logits = logits.masked_fill(~seen[:, None, None], float("-inf"))
    if not call.cache:
        return logits[..., :0], logits.softmax(-1)

    cached = q_far @ call.codebook.mT[:, None] + call.state.count.log()[:, :, None, None]
    cached = cached.masked_fill((call.query_run != 0)[:, None, None, :, None], float("-inf"))
    p_cached, p = torch.cat([cached, logits], dim=-1).softmax(-1).split([cached.shape[-1], M + T], dim=-1)
    return p_cached, p


def places(M: int, T: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of queries (T, 1), and of keys (M+T,), the carried ones before 0."""
    return torch.arange(T, device=device)[:, None], torch.arange(-M, T, device=device)


def gradient_rule(call: Call, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (i, j) that send gradient to the key, and to the value: (T, M+T) bool each. See `vq_attention`."""
    if call.gradients == "window":
        inside = i - j <= call.window
        return inside, inside | call.grad_through_cache
    start = i - i % call.block_len
    if call.grad_through_cache:
        return j >= start - call.window, torch.ones_like(j <= i)
    return j >= start, j >= start


def inner(q: Tensor, k: Tensor, live: Tensor) -> Tensor:
    """q_i·k_j, with gradient to k_j from the pairs in `live` only."""
    return torch.where(live, q @ k.mT, q @ k.detach().mT)


def weighted(p: Tensor, v: Tensor, live: Tensor) -> Tensor:
    """Σ_j p_ij v_j, with gradient to v_j from the pairs in `live` only."""
    return (p * live) @ v + (p * ~live) @ v.detach()
