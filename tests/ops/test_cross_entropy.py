"""The loss in pieces against the loss on all logits."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from helpers import assert_same
from torch.nn import functional as F

from transformer_vq import TransformerVQ, TransformerVQConfig
from transformer_vq.ops import cross_entropy
from transformer_vq.ops.cross_entropy import linear_logits, summed_cross_entropy

N, D, V, SCALE = 23, 8, 50, 0.7


def inputs(dtype):
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=draw, dtype=dtype) for shape in ((N, D), (V, D), (V,)))
    labels = torch.randint(V, (N,), generator=draw)
    labels[::5] = -100
    return [t.requires_grad_() for t in (x, weight, bias)], labels


def run(function, dtype, autocast):
    tensors, labels = inputs(dtype)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        total = function(*tensors, SCALE, labels)
    total.backward()
    return {"loss": total.detach(), **dict(zip("xwb", (t.grad for t in tensors), strict=True))}


def whole(x, weight, bias, scale, labels):
    return F.cross_entropy(linear_logits(x, weight, bias, scale), labels, reduction="sum")


@pytest.mark.parametrize("held", [1, V * 4, N * V])
@pytest.mark.parametrize(
    ("dtype", "autocast", "rtol"),
    [(torch.float64, False, 1e-12), (torch.float32, False, 1e-5), (torch.float32, True, 1e-2)],
    ids=["fp64", "fp32", "bf16"],
)
@pytest.mark.parametrize("chunked_by_torch", [True, False])
def test_equals_the_loss_on_all_logits(monkeypatch, held, dtype, autocast, rtol, chunked_by_torch):
    monkeypatch.setattr(cross_entropy, "HELD", held)
    if not chunked_by_torch:
        monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    got, want = run(summed_cross_entropy, dtype, autocast), run(whole, dtype, autocast)
    if held == N * V:
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert_same(got, want, rtol)


def test_no_more_logits_are_held_than_allowed(monkeypatch):
    monkeypatch.setattr(cross_entropy, "HELD", 4 * V)
    seen, original = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda x, *a, **k: [seen.append(x.numel()), original(x, *a, **k)][1])
    run(summed_cross_entropy, torch.float64, False)
    assert max(seen) == 4 * V and sum(seen) >= N * V


def test_pieces_are_one_graph_for_the_compiler(monkeypatch):
    monkeypatch.setattr(cross_entropy, "HELD", 4 * V)
    compiled = torch.compile(summed_cross_entropy, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, torch.float32, False), run(whole, torch.float32, False), 1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_gives_the_same_loss_without_logits(monkeypatch, tied):
    config = TransformerVQConfig(vocab_size=37, layers=1, width=16, tied_embedding=tied, logit_scale=0.5)
    tokens, found = torch.arange(60).view(3, 20) % 37, []
    for held, logits in ((2**24, True), (2**24, False), (100, False)):
        monkeypatch.setattr(cross_entropy, "HELD", held)
        model = TransformerVQ(config)
        out = model(tokens, labels=tokens, logits=logits)
        assert (out.logits is None) == (not logits)
        out.loss.backward()
        found.append({"loss": out.loss.detach(), **{n: p.grad for n, p in model.named_parameters()}})
    assert all(torch.equal(found[1][name], x) for name, x in found[0].items())
    assert_same(found[2], found[0], 1e-4)
