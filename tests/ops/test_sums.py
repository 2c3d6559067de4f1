"""Sums by index, and the GPU on which kernels are launched."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from transformer_vq.ops.kernels.device import on_its_device
from transformer_vq.ops.sums import add_rows, take_rows


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rows_are_added_where_the_index_says_and_always_in_one_order(device):
    torch.manual_seed(0)
    index, rows = torch.randint(5, (3000,), device=device), torch.randn(3000, 4, device=device)
    began = torch.randn(5, 4, device=device)
    first, second = (add_rows(began.clone(), index, rows) for _ in range(2))
    want = began.double() + torch.nn.functional.one_hot(index, 5).double().T @ rows.double()
    torch.testing.assert_close(first.double(), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(first, second)


def test_kernels_are_launched_on_the_gpu_of_their_tensors(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: seen.append(x) or nullcontext())

    @on_its_device
    def launch(plan, x, y):
        return plan, len(seen)

    one, other = torch.zeros(1), torch.zeros(2)
    assert launch("plan", one, other) == ("plan", 1) and seen[0] is one


def test_everything_that_launches_does_so():
    pytest.importorskip("triton")
    from transformer_vq.ops.attention import launch, ring
    from transformer_vq.ops.kernels import nearest

    assert all(hasattr(f, "__wrapped__") for f in (launch.attend, launch.gradients, ring.step, nearest.nearest))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_codes_on_the_second_gpu_are_those_of_the_first():
    from transformer_vq.ops.nearest import nearest_code

    torch.manual_seed(0)
    k, codebook = torch.randn(2, 2, 3000, 64), torch.randn(2, 512, 64)
    first, second = (nearest_code(k.to(d), codebook.to(d)).cpu() for d in ("cuda:0", "cuda:1"))
    assert torch.equal(first, second)


def test_the_compiler_leaves_sums_alone():
    """Else it makes them of atomics, in another order every time."""
    graphs = []

    def look(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    def work(index, rows):
        return add_rows(rows.new_zeros(5, 3), index, rows) * 2

    index, rows = torch.randint(5, (40,)), torch.randn(40, 3)
    compiled = torch.compile(work, backend=aot_autograd(fw_compiler=look), fullgraph=True)
    assert torch.equal(compiled(index, rows), work(index, rows))
    named = " ".join(graphs[0])
    assert "transformer_vq" in named or "auto_functionalized" in named
    assert "index_add" not in named and "index_put" not in named


def test_notes_of_keys_that_are_learned_are_left_alone_too():
    """Under `no_grad` a view of a parameter still says that it requires gradients while it is compiled."""
    graphs = []

    def look(graph, inputs):
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    @torch.no_grad()
    def notes(index, rows):
        return add_rows(rows.new_zeros(5, 3), index, rows.reshape(-1, 3))

    index, rows = torch.randint(5, (40,)), torch.randn(4, 10, 3, requires_grad=True)
    compiled = torch.compile(
        lambda index, rows: (notes(index, rows), rows * 2), backend=aot_autograd(fw_compiler=look), fullgraph=True
    )
    assert torch.equal(compiled(index, rows)[0], notes(index, rows))
    assert "index_add" not in graphs[0] and "index_put" not in graphs[0]


def test_rows_that_are_taken_get_their_gradients_in_one_order():
    backward = []

    def look(graph, inputs):
        backward.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    table, index = torch.randn(5, 3, requires_grad=True), torch.randint(5, (4, 10))
    slope = torch.randn(4, 10, 3)
    call = torch.compile(
        take_rows,
        backend=aot_autograd(fw_compiler=lambda g, x: make_boxed_func(g.forward), bw_compiler=look),
        fullgraph=True,
    )
    found = [torch.autograd.grad(f(table, index), table, slope)[0] for f in (call, take_rows)]
    torch.testing.assert_close(*found)
    assert "add_rows" in backward[0] or "auto_functionalized" in backward[0]
    assert "embedding_dense_backward" not in backward[0]
    assert torch.equal(call(table, index), table[index])


def test_sums_that_need_gradients_have_them_compiled_too():
    index, rows = torch.randint(5, (40,)), torch.randn(40, 3, requires_grad=True)
    compiled = torch.compile(
        lambda index, rows: add_rows(rows.new_zeros(5, 3), index, rows), backend="aot_eager", fullgraph=True
    )
    (d_rows,) = torch.autograd.grad(compiled(index, rows)[2].sum(), rows)
    assert torch.equal(d_rows[:, 0], (index == 2).float())


def test_the_compiler_is_told_the_truth_of_sums():
    torch.library.opcheck(
        torch.ops.transformer_vq.add_rows, (torch.zeros(5, 3), torch.randint(5, (40,)), torch.randn(40, 3))
    )
