"""Recurrent VQ attention: one token at a time, for generation. One step costs O(S + M), whatever came before.

When a key leaves the window, it enters the mean of its code:  n' = n + 1,  m' = m·n/n' + v/n'.
Gradients are PyTorch's own, and keep O(T·S·V) numbers: for training there is blockwise.py.

Axes:  B batch  Hkv key heads  G queries a key head  T length  K, V widths  S codes  M window  L block
Oracle: quadratic.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_vq.ops.attention.call import Call
from transformer_vq.ops.attention.rotary import positioned


def recurrent(call: Call) -> Tensor:
    """`Call` -> o (B, Hkv, G, T, V). Keys lie as M carried ones, then T of the call: the window of i is i … i+M."""
    call = call.wide()
    M, L, T = call.window, call.block_len, call.q.shape[3]
    strip_stays_exact = call.gradients == "block" and call.cache  # the paper's rule: keys of the block's strip learn
    q, q_far, k = positioned(call)
    k_far = call.k_beyond_window if strip_stays_exact and T > 1 else k  # else nothing is read from it
    k, k_far, v, codes = k[:, :, None], k_far[:, :, None], call.v_with_carried[:, :, None], call.codes_with_carried
    query_run, key_run = call.query_run, call.key_run
    count, mean, left = call.state.count, call.state.mean, 0  # `left` keys are in the cache by now
    mean = mean if call.grad_through_cache else mean.detach()
    before = torch.zeros_like(query_run[:, :1])

    o = []
    for i in range(T):
        run, start = query_run[:, i, None], i - i % L
        first = start if strip_stays_exact else i
        live = start + M if call.gradients == "block" and not call.grad_through_cache else 0
        if call.run is not None:
            same = (run == before)[..., None]
            count, mean, before = count * same, mean * same[..., None], run
        for j in range(left, first):
            stays = (key_run[:, j, None, None] == run[..., None]).to(count.dtype)
            one = F.one_hot(codes[:, :, j], count.shape[2]) * stays
            more = count + one
            share = (count / more.clamp_min(1))[..., None]
            value = v[:, :, 0, j, None] if call.grad_through_cache else v[:, :, 0, j, None].detach()
            count, mean = more, share * mean + (one / more.clamp_min(1))[..., None] * value
        left = first

        at, window = slice(i, i + 1), slice(i, i + M + 1)
        near = q[..., at, :] @ live_from(k, i, i + M + 1, live).mT
        if call.bias is not None:
            near = near + call.bias[..., at if call.bias.shape[3] > 1 else slice(None), :].flip(-1)
        bubble = q_far[..., at, :] @ live_from(k_far, first, i, live).mT
        exact = torch.cat([bubble, near], dim=-1)
        hidden = key_run[:, first : window.stop] != run
        exact = exact.masked_fill(hidden[:, None, None, None], float("-inf"))
        values = live_from(v, first, window.stop, live)
        if not call.cache:
            o.append(exact.softmax(-1) @ values)
            continue
        cached = q_far[..., at, :] @ call.codebook.mT[:, None] + count.log()[:, :, None, None]
        p = torch.cat([cached, exact], dim=-1).softmax(-1)
        S = count.shape[2]
        o.append(p[..., :S] @ mean[:, :, None] + p[..., S:] @ values)
    return torch.cat(o, dim=3)


def live_from(x: Tensor, first: int, last: int, live: int) -> Tensor:
    """x (…, M+T, D) -> its keys first … last−1, those before `live` without gradient."""
    if live <= first:
        return x[..., first:last, :]
    live = min(live, last)
    return torch.cat([x[..., first:live, :].detach(), x[..., live:last, :]], dim=-2)
