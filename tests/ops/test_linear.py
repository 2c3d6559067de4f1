"""Products in C++ against `torch.nn.functional.linear` in fp64: any sizes, layouts and division."""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from transformer_vq.models.linear import Linear
from transformer_vq.ops import linear as ours
from transformer_vq.ops import threads
from transformer_vq.ops.attention import native
from transformer_vq.ops.kernels.compiler import library
from transformer_vq.ops.linear import linear, possible

pytestmark = pytest.mark.skipif(native.lack() is not None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def on_every_processor(monkeypatch):
    """And from the first row on."""
    monkeypatch.setattr(ours, "quicker", lambda: True)
    monkeypatch.setattr(ours, "WORTH_ROWS", 1)
    monkeypatch.setattr(ours, "WORTH_WIDTH", 1)


def value_and_gradients(function, slope, *inputs):
    """Of a linear map: y, d_x, d_W and, with a bias, d_b."""
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, slope)]


def random(*sizes, gap=0, turned=False):
    """Normal numbers, with a gap between rows, or columns where rows should be."""
    x = torch.randn(*sizes[:-1], sizes[-1] + gap, generator=torch.Generator().manual_seed(sum(sizes)))[..., : sizes[-1]]
    return (x.mT.contiguous().mT if turned else x).requires_grad_()


def close_to_fp64(inputs, slope):
    """Assert that our fp32 is within rounding of sums of that many products, in units of their size."""
    got = value_and_gradients(linear, slope, *inputs)
    want = value_and_gradients(F.linear, slope.double(), *(t.detach().double().requires_grad_() for t in inputs))
    for ours_, theirs in zip(got, want, strict=True):
        assert ours_.dtype == torch.float32 and ours_.shape == theirs.shape
        scale = theirs.abs().max().item() if theirs.numel() else 0
        torch.testing.assert_close(ours_.double(), theirs, rtol=0, atol=1e-5 * scale + 1e-12)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=2),
    st.integers(1, 70),
    st.integers(1, 70),
    st.booleans(),
    st.integers(0, 3),
    st.booleans(),
    st.integers(1, 3),
)
def test_equals_the_definition(rows, inputs, outputs, biased, gap, turned, workers):
    with pytest.MonkeyPatch.context() as patch:
        for name, small in {"HIGH": 7, "SIDE": 20, "PIECES": 5, "PART": 11}.items():  # many pieces of few numbers
            patch.setattr(ours, name, small)
        patch.setattr(ours, "outer_threads", lambda like: workers)
        given_ = [random(*rows, inputs, gap=gap, turned=turned), random(outputs, inputs, gap=gap, turned=not turned)]
        close_to_fp64([*given_, *([random(outputs)] if biased else [])], random(*rows, outputs, gap=gap).detach())


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1500, 300, 400), (97, 257, 33), (700, 5, 500), (1, 1, 1)])
def test_sizes_on_both_sides_of_a_block(rows, inputs, outputs):
    close_to_fp64([random(rows, inputs), random(outputs, inputs), random(outputs)], random(rows, outputs).detach())


def test_is_bit_for_bit_the_same_with_any_number_of_threads_and_for_a_part_of_the_rows(monkeypatch):
    x, w, slope = random(1500, 100), random(150, 100), random(1500, 150).detach()
    found = []
    for workers in (1, 2, 3, 2):
        monkeypatch.setattr(ours, "outer_threads", lambda like, workers=workers: workers)
        found.append(value_and_gradients(linear, slope, x, w))
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], one, strict=True))
    assert torch.equal(linear(x[77:300], w), found[0][0][77:300])


def test_what_is_not_for_it_goes_to_torch(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(ours, "quicker", lambda: True)
    x, w, b = torch.ones(2, ours.WORTH_ROWS, 96), torch.ones(100, 96), torch.ones(100)
    assert possible(x, w, b) and possible(x[0], w, None)
    assert not possible(x[0, 1:], w, b)
    assert not possible(x, w[:95], None) and not possible(x[..., 1:], w[:, 1:], b)
    assert not possible(x, w, b[1:]) and not possible(x[..., 1:], w, b) and not possible(x, b, None)
    assert not possible(x.double(), w.double(), b.double()) and not possible(x, w.double(), b)
    assert not possible(x.bfloat16(), w.bfloat16(), b.bfloat16())
    assert not possible(x.to("meta"), w.to("meta"), b.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not possible(x, w, b)
        assert linear(x, w, b).dtype == torch.bfloat16
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert not possible(x, w, b)
    monkeypatch.setattr(ours, "quicker", lambda: False)
    assert not possible(x, w, b)


@pytest.mark.parametrize(
    ("vendor", "flags", "quicker"),
    [
        ("AuthenticAMD", "fma avx2", True),
        ("AuthenticAMD", "fma avx2 avx512f", False),
        ("AuthenticAMD", "fma avx", False),
        ("GenuineIntel", "fma avx2", False),
        ("", "", False),
    ],
)
def test_processors_on_which_it_was_measured(monkeypatch, vendor, flags, quicker):
    monkeypatch.undo()
    monkeypatch.setattr(ours, "cpu_flags", lambda: (vendor, flags.split()))
    assert ours._quicker.__wrapped__() is quicker


@pytest.mark.parametrize("sizes", [((5, 6), (7, 5)), ((5, 6), (7, 6, 1)), ((5, 6), (6,), (7,))])
def test_wrong_sizes_are_errors_as_by_torch(sizes):
    given_ = [torch.ones(size) for size in sizes]
    with pytest.raises(RuntimeError) as theirs:
        F.linear(*given_)
    with pytest.raises(RuntimeError) as error:
        linear(*given_)
    assert str(error.value) == str(theirs.value)


def test_only_gradients_that_are_asked_for():
    x, w, slope = random(40, 6), random(7, 6), random(40, 7).detach()
    both = torch.autograd.grad(linear(x, w), (x, w), slope)
    assert torch.equal(torch.autograd.grad(linear(x, w.detach()), x, slope)[0], both[0])
    assert torch.equal(torch.autograd.grad(linear(x.detach(), w), w, slope)[0], both[1])


def test_second_derivatives_and_gradients_in_batches():
    x, w, b = random(9, 6), random(7, 6), random(7)

    def second(function):
        first = torch.autograd.grad(function(x, w, b).sin().sum(), (x, w, b), create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), (x, w, b))

    def batch(function):
        slopes = random(3, 9, 7).detach()
        return torch.autograd.grad(function(x, w, b), (x, w, b), slopes, is_grads_batched=True)

    for work in (second, batch):
        for got, want in zip(work(linear), work(F.linear), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_one_gradient_for_all_numbers():
    x, w = random(50, 6), random(7, 6)
    for got, want in zip(*(torch.autograd.grad(f(x, w).sum(), (x, w)) for f in (linear, F.linear)), strict=True):
        torch.testing.assert_close(got, want)


def test_a_number_that_is_none_stays_in_its_row_and_column():
    x, w = random(40, 20).detach().clone(), random(33, 20).detach()
    x[3, 5], w = float("nan"), w.clone()
    w[32, 0] = float("inf")
    torch.testing.assert_close(linear(x, w), F.linear(x, w), equal_nan=True)


def test_a_tracer_sees_torch():
    x, w = random(40, 6).detach(), random(7, 6).detach()
    graph = make_fx(lambda x, w: linear(x, w))(x, w)
    torch.testing.assert_close(graph(2 * x, w), F.linear(2 * x, w))


def test_without_openmp_threads_are_ours(monkeypatch):
    monkeypatch.setattr(ours, "outer_threads", lambda like: 2)
    inputs, slope = [random(700, 30), random(20, 30)], random(700, 20).detach()
    want = value_and_gradients(linear, slope, *inputs)
    monkeypatch.setattr(threads, "_openmp", lambda: None)
    got = value_and_gradients(linear, slope, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_module_is_torchs_but_for_its_products():
    torch.manual_seed(0)
    mine = Linear(6, 7)
    theirs = nn.Linear(6, 7)
    theirs.load_state_dict(mine.state_dict())
    x = random(40, 6)
    assert isinstance(mine, nn.Linear)
    torch.testing.assert_close(mine(x), theirs(x))


@pytest.mark.parametrize("biased", [True, False])
def test_compiled_in_one_graph_it_is_the_same(biased):
    x, w, slope = random(3, 50, 6), random(7, 6), random(3, 50, 7).detach()
    inputs = [x, w, *([random(7)] if biased else [])]
    graph = torch.compile(linear, backend="aot_eager", fullgraph=True)
    for got, want in zip(*(value_and_gradients(f, slope, *inputs) for f in (graph, linear)), strict=True):
        assert torch.equal(got, want)


def test_the_compiler_gets_what_it_needs_to_know():
    a, b = random(40, 6).detach(), random(40, 7).detach()
    torch.library.opcheck(torch.ops.transformer_vq.product, (a, b[:6], b[0]))
    torch.library.opcheck(torch.ops.transformer_vq.product, (a, b[:6], None))
    torch.library.opcheck(torch.ops.transformer_vq.transposed, (a, b))


def test_python_and_c_agree_on_what_is_handed_over():
    assert library(ours.SOURCE).size_of_linear_work() == ctypes.sizeof(ours.Work)
