"""Products in C++ against `torch.nn.functional.linear` in fp64: any sizes, layouts and division."""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from transformer_vq.config import TransformerVQConfig
from transformer_vq.models import TransformerVQ
from transformer_vq.models.linear import looked_up, mapped
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
    assert ours.quicker.__wrapped__() is quicker


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


def in_both(work):
    """What `work` returns with products in C++, which must be made, and by torch."""
    made, product = [], ours.product
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "product", lambda *given: made.append(1) or product(*given))
        got = work()
    assert made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "quicker", lambda: False)
        return got, work()


def test_what_it_returns_may_be_changed_in_place():
    x, w = random(3, 20, 6), random(7, 6)
    got, want = in_both(lambda: torch.autograd.grad(linear(x, w).add_(1).relu_().sum(), (x, w)))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_keeps_what_the_gradients_need_and_no_more(frozen):
    inputs = [random(40, 6).detach(), random(7, 6).detach(), random(7).detach()]
    learned = [t for i, t in enumerate(inputs) if i != frozen]
    for t in learned:
        t.requires_grad_()

    def saved():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            y = linear(*inputs)
        torch.autograd.grad(y.sum(), learned)
        return sorted(map(sorted, kept))

    got, want = in_both(saved)
    assert got == want


def test_gradients_in_another_type_after_hooks_are_errors_as_by_torch():
    def broken():
        with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.half, lambda t: t):
            y = linear(random(40, 6), random(7, 6))
        with pytest.raises(RuntimeError, match="dtype"):
            y.sum().backward()

    in_both(broken)


def test_zeros_that_are_not_stored():
    x, w = random(40, 6), random(7, 6)
    for d in torch.autograd.grad(linear(x, w), (x, w), torch._efficientzerotensor((40, 7))):
        assert not d.any()


def test_transforms_of_functions_and_dual_numbers():
    x, w = random(40, 6).detach(), random(7, 6).detach()
    along = random(40, 6).detach() + 1
    for f in (linear, F.linear):
        _, tangent = torch.func.jvp(lambda x, f=f: f(x, w), (x,), (along,))
        torch.testing.assert_close(tangent, F.linear(along, w))
        beside = torch.func.vmap(lambda s, f=f: s * f(x, w))(torch.ones(3))
        torch.testing.assert_close(beside[1], F.linear(x, w))
        with torch.autograd.forward_ad.dual_level():
            dual = f(torch.autograd.forward_ad.make_dual(x, along), w)
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, F.linear(along, w))


def test_a_tracer_before_dispatch_sees_torch():
    x, w = random(40, 6).detach(), random(7, 6).detach()
    graph = make_fx(lambda x, w: linear(x, w), pre_dispatch=True)(x, w)
    torch.testing.assert_close(graph(2 * x, w), F.linear(2 * x, w))
    traced = torch.jit.trace(lambda x, w: linear(x, w), (x, w))
    assert "aten::linear" in str(traced.graph)


def test_a_layer_that_somebody_changed_is_called(monkeypatch):
    layer, x = nn.Linear(6, 7), random(40, 6)
    torch.testing.assert_close(*in_both(lambda: mapped(layer, x)))
    called = []
    monkeypatch.setattr(ours, "product", lambda *given: pytest.fail("the layer must be called"))

    class Other(nn.Linear):
        pass

    mapped(Other(6, 7), x)
    hook = layer.register_forward_pre_hook(lambda *_: called.append("before"))
    mapped(layer, x)
    hook.remove()
    hook = nn.modules.module.register_module_forward_hook(lambda *_: called.append("everywhere"))
    mapped(layer, x)
    hook.remove()
    layer.forward = lambda x: called.append("instead")
    mapped(layer, x)
    assert called == ["before", "everywhere", "instead"]


@pytest.mark.parametrize("block", ["gau", "transformer"])
def test_a_model_is_the_same_with_either(block):
    config = TransformerVQConfig(
        vocab_size=11, layers=2, width=16, heads=2, key_dim=8, value_dim=16, window=8, block_len=8, block=block,
        position="rotary", quantizer={"kind": "vq", "codes": 8},
    )  # fmt: skip
    model = TransformerVQ(config, seed=0)
    tokens = torch.arange(60).view(2, 30) % 11

    def step():
        model.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    got, want = in_both(step)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_python_and_c_agree_on_what_is_handed_over():
    assert library(ours.SOURCE).size_of_linear_work() == ctypes.sizeof(ours.Work)


def test_an_embedding_that_does_more_is_called_as_it_is_when_compiled():
    tokens, asked = torch.tensor([[1, 2], [0, 1]]), []

    class Other(nn.Embedding):
        def forward(self, tokens):
            asked.append("class")
            return super().forward(tokens)

    hooked, padded = nn.Embedding(4, 3), nn.Embedding(4, 3, padding_idx=1)
    hooked.register_forward_hook(lambda *_: asked.append("hook"))
    for layer in (Other(4, 3), hooked, padded, nn.Embedding(4, 3)):
        torch._dynamo.reset()
        call = torch.compile(lambda t, layer=layer: looked_up(layer, t), backend="aot_eager", fullgraph=True)
        found = [torch.autograd.grad(f(tokens).sum(), layer.weight)[0] for f in (call, layer)]
        assert torch.equal(*found)
    assert set(asked) == {"class", "hook"}
    assert not found[0][3].any() and padded.weight.grad is None
