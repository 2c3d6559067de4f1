"""Rows in C++ against the formulas: any layout, any division, and numbers at the ends of their range."""

import ctypes
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from transformer_vq.ops import rows, threads
from transformer_vq.ops.attention import native
from transformer_vq.ops.kernels.compiler import library
from transformer_vq.ops.rms_norm import rms_norm
from transformer_vq.ops.swiglu import swiglu

pytestmark = pytest.mark.skipif(native.lack() is not None, reason="no C++ compiler")


def in_both(work, workers=1):
    """What `work` returns in C++, from the first number on and by so many threads, and by the formulas."""
    found = []
    for least in (1, 2**62):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rows, "WORTH", least)
            patch.setattr(rows, "WORTH_A_THREAD", 1)
            patch.setattr(rows, "outer_threads", lambda like: workers)
            found.append(work())
    return found


def value_and_gradients(function, *inputs):
    """Of a function that returns one tensor, for a gradient that is laid out as the result is not."""
    y = function(*inputs)
    slope = (
        torch.randn(y.mT.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype).mT if y.dim() > 1 else 2 * y
    )
    return [y.detach(), *torch.autograd.grad(y, inputs, slope)]


def strided(sizes, order, gap, dtype):
    """Random numbers of these sizes, whose axes but the last lie in memory in this order, with gaps between rows."""
    order = [axis for axis in order if axis < len(sizes) - 1]
    x = torch.randn(*(sizes[axis] for axis in order), sizes[-1] + gap, generator=torch.Generator().manual_seed(0))
    x = x[..., : sizes[-1]].to(dtype)
    return x.permute(*(order.index(axis) for axis in range(len(order))), len(order)).requires_grad_()


shapes = st.tuples(
    st.lists(st.integers(0, 5), max_size=3), st.integers(1, 21), st.permutations(range(3)), st.integers(0, 3)
)


@settings(deadline=None)
@given(shapes, st.booleans(), st.sampled_from([torch.float32, torch.float64]), st.integers(1, 3))
def test_norm_equals_the_formula(shape, learned, dtype, workers):
    sizes, width, order, gap = shape
    x = strided((*sizes, width), order, gap, dtype)
    own = [torch.randn(width, dtype=dtype, requires_grad=True) for _ in range(2 if learned else 0)]

    def work():
        return value_and_gradients(lambda x, *own: rms_norm(x, *(own or (None, None)), 0.7, 1e-3), x, *own)

    got, want = in_both(work, workers)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    if x.numel():
        assert (
            got[0].stride() == torch.empty_like(x).stride()
        )  # so that heads go back to where they came from, uncopied


@settings(deadline=None)
@given(shapes, st.sampled_from([torch.float32, torch.float64]), st.integers(1, 3))
def test_swiglu_equals_the_formula(shape, dtype, workers):
    sizes, width, order, gap = shape
    joint = strided((*sizes, 2 * width), order, gap, dtype)
    got, want = in_both(lambda: value_and_gradients(swiglu, joint), workers)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-13, "atol": 1e-13}
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_at_the_ends_of_their_range(dtype):
    gates = torch.tensor([0.0, -0.0, 1e-30, 20, -20, 86, -86, 88, -88, 1e4, -1e4, math.inf, math.nan], dtype=dtype)
    joint = torch.cat([gates, torch.linspace(-2, 2, len(gates), dtype=dtype)])[None].requires_grad_()
    got, want = in_both(lambda: value_and_gradients(swiglu, joint))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-30, equal_nan=True)

    x = torch.tensor([[1e-25, 0.0], [1e18, -1e18], [0.0, 0.0], [math.nan, 1.0], [1.0, 1.0]], dtype=dtype)
    got, want = in_both(lambda: value_and_gradients(lambda x: rms_norm(x, None, None, 1.0, 1e-6), x.requires_grad_()))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_sum_over_many_rows_keeps_its_digits():
    x, g, b = torch.ones(100_000, 4), torch.ones(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    d_y = torch.full_like(x, 0.1)
    (_, d_b), _ = in_both(lambda: torch.autograd.grad(rms_norm(x, g, b, 1.0, 0.0), (g, b), d_y))
    torch.testing.assert_close(d_b, torch.full((4,), 1e4), rtol=1e-6, atol=0)


def test_is_the_same_with_any_number_of_threads_and_twice():
    joint = torch.randn(3, 50, 24, requires_grad=True)
    x, g, b = torch.randn(7, 33, 9, requires_grad=True), *(torch.randn(9, requires_grad=True) for _ in range(2))

    def work():
        return value_and_gradients(swiglu, joint) + value_and_gradients(lambda *n: rms_norm(*n, 1.0, 1e-6), x, g, b)

    (one, _), (two, _), (again, _) = (in_both(work, workers) for workers in (1, 2, 2))
    assert all(torch.equal(a, b) for a, b in zip(two, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one[:4], two[:4], strict=True))  # all but sums over rows
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


def test_what_is_not_for_it_goes_by_the_formulas(monkeypatch):
    assert rows.possible(torch.ones(1, rows.WORTH))
    assert not rows.possible(torch.ones(1, rows.WORTH - 1))
    assert not rows.possible(torch.ones(1, rows.WORTH, dtype=torch.bfloat16))
    assert not rows.possible(torch.ones(1, 1, 1, 1, rows.WORTH))
    assert not rows.possible(torch.ones(rows.WORTH, 2).T)
    assert not rows.possible(torch.ones(1, rows.WORTH, device="meta"))
    assert not rows.possible(torch._neg_view(torch.ones(1, rows.WORTH)))
    assert not rows.possible(torch.ones(1, rows.WIDEST + 1))
    one, own = torch.ones(1, rows.WORTH), torch.ones(rows.WORTH)
    assert rows.possible(one, own, own) and rows.possible(one, None, None)
    assert not rows.possible(one, own, None)
    assert not rows.possible(one, own[1:], own[1:])
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert not rows.possible(one)
    with torch._subclasses.FakeTensorMode():
        assert not rows.possible(torch.ones(1, rows.WORTH))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not rows.possible(torch.ones(1, rows.WORTH))


@pytest.mark.parametrize("size", [rows.WORTH - 1, rows.WORTH + 1])
def test_wrong_sizes_are_errors_as_by_the_formulas(size):
    with pytest.raises(RuntimeError, match="match"):
        rms_norm(torch.ones(2, size), torch.ones(size + 1), torch.zeros(size + 1), 1.0, 1e-6)
    with pytest.raises(RuntimeError, match="match"):
        swiglu(torch.ones(3, size | 1))


def test_rows_that_overlap():
    joint = torch.randn(40).unfold(0, 8, 1)[:16].requires_grad_()
    got, want = in_both(lambda: value_and_gradients(swiglu, joint))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
    x = torch.randn(100).unfold(0, 8, 1)[:8].requires_grad_()
    got, want = in_both(lambda: value_and_gradients(lambda x: rms_norm(x, None, None, 1.0, 1e-6), x))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_in_batches():
    x, g, b = torch.randn(5, 6, requires_grad=True), *(torch.randn(6, requires_grad=True) for _ in range(2))
    slopes = torch.randn(3, 5, 6)
    got, want = in_both(
        lambda: torch.autograd.grad(rms_norm(x, g, b, 1.0, 1e-6), (x, g, b), slopes, is_grads_batched=True)
    )
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_tracer_sees_the_formulas():
    x = torch.randn(2, rows.WORTH)
    for function in (swiglu, lambda x: rms_norm(x, None, None, 1.0, 1e-6)):
        graph = make_fx(function)(torch.zeros_like(x))
        torch.testing.assert_close(graph(x), function(x))


def test_without_openmp_threads_are_ours(monkeypatch):
    joint = torch.randn(40, 24, requires_grad=True)
    want = in_both(lambda: value_and_gradients(swiglu, joint), 2)[0]
    monkeypatch.setattr(threads, "_openmp", lambda: None)
    got = in_both(lambda: value_and_gradients(swiglu, joint), 2)[0]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_gradient_for_every_row_at_once():
    joint = torch.randn(5, 6, requires_grad=True)
    (got,), (want,) = in_both(lambda: torch.autograd.grad(swiglu(joint).sum(), joint))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(swiglu(joint), F.silu(joint[:, :3]) * joint[:, 3:])


def test_python_and_c_agree_on_what_is_handed_over():
    assert library(rows.SOURCE).size_of_row_work() == ctypes.sizeof(rows.Work)
