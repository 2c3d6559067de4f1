"""The formulas of FLOPs and bytes, held against what PyTorch counts of the code itself."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from transformer_vq.bench import attention, work
from transformer_vq.ops.attention import op

SIZES = {"heads": 2, "width": 16, "codes": 32, "window": 16, "block_len": 16}


@pytest.fixture
def unwrapped(monkeypatch):
    """The counter does not look into an opaque op."""
    from transformer_vq.ops.attention import dispatch
    from transformer_vq.ops.attention.backends import backend_named

    monkeypatch.setattr(dispatch, "attend", lambda call: backend_named(call.backend)(call))
    monkeypatch.setattr(dispatch, "native_lack", lambda: "it counts products of PyTorch's")


def test_vq_attention_does_the_products_of_the_formula(unwrapped):
    _, step = attention.heads(512, "cpu", **SIZES)
    with FlopCounterMode(display=False) as counter:
        step()
    needed = work.vq_attention(2, 512, 16, 32, 16, 16).flops
    # Beside the pairs: running sums over the 32 blocks, of counts and values twice forward and of values once back.
    sums = 2 * 2 * 33**2 * 32 * (2 * (16 + 1) + 16)
    assert needed <= counter.get_total_flops() <= 1.01 * (needed + sums)


def test_more_columns_are_more_work(unwrapped):
    def counted(window):
        _, step = attention.heads(512, "cpu", **SIZES | {"window": window})
        with FlopCounterMode(display=False) as counter:
            step()
        return counter.get_total_flops()

    more = work.vq_attention(2, 512, 16, 32, 64, 16).flops - work.vq_attention(2, 512, 16, 32, 16, 16).flops
    assert counted(64) - counted(16) == pytest.approx(more, rel=0.01)


def test_rows_and_a_lookup_are_more_of_the_same():
    one = work.vq_attention(2, 64, 16, 32, 16, 16)
    assert work.vq_attention(2, 64, 16, 32, 16, 16, rows=3) == work.Work(3 * one.flops, 3 * one.bytes)
    keys = torch.zeros(2 * 64, 16)
    with FlopCounterMode(display=False) as counter:
        keys @ torch.zeros(16, 32)
    both = work.vq_attention(2, 64, 16, 32, 16, 16, lookup=True)
    assert both.flops - one.flops == counter.get_total_flops()
    assert both.bytes - one.bytes == 2 * keys.nbytes + 8 * len(keys)


def test_the_quantizers_distances_and_bytes():
    keys, codebook = torch.zeros(64, 16), torch.zeros(32, 16)
    with FlopCounterMode(display=False) as counter:
        keys @ codebook.T
    assert work.quantizer(64, 16, 32) == work.Work(
        counter.get_total_flops(), 6 * keys.nbytes + 64 * 8 + 3 * codebook.nbytes
    )


@pytest.mark.parametrize("lookup", [False, True])
def test_all_sides_read_the_same_keys_and_ours_gives_all_gradients(lookup, monkeypatch):
    x, step = attention.heads(64, "cpu", rows=2, lookup=lookup, **SIZES)
    assert x.q.shape == x.k.shape == x.v.shape == (2, 2, 64, 16)
    asked = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *given, **how: asked.append(grad(*given, **how)) or asked[-1])
    step()
    assert [d.shape for d in asked[-1]] == [x.q.shape] * 3 and all(d.abs().sum() > 0 for d in asked[-1])


def test_full_attention_is_half_of_what_the_counter_says():
    """The plain form does all pairs, and keeps the probabilities: 6 products, not 7."""
    q, k, v = (torch.randn(1, 2, 256, 16, requires_grad=True) for _ in range(3))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    assert work.full_attention(2, 256, 16).flops / 7 == pytest.approx(counter.get_total_flops() / 2 / 6, rel=0.02)


def test_bytes_are_those_of_the_tensors():
    x, _ = attention.heads(128, "cpu", **SIZES)
    o = x.v
    forward = [x.q, x.k, x.v, o]
    backward = [x.q, x.k, x.v, o, x.slope, x.q, x.k, x.v]
    codes = 2 * 2 * 128 * 8
    assert work.vq_attention(2, 128, 16, 32, 16, 16).bytes == sum(t.nbytes for t in forward + backward) + codes
    assert work.full_attention(2, 128, 16).bytes == sum(t.nbytes for t in forward + backward)


def test_the_roofline_is_the_higher_of_two_ceilings():
    assert work.Work(100, 1).seconds(10, 1000) == 10
    assert work.Work(1, 1000).seconds(10, 10) == 100


def test_the_ops_name_is_there_to_unwrap():
    assert callable(op.attend)
