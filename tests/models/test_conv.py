"""The short convolution against a loop over tokens that asks, for every tap, whether that token is there to be seen."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_vq import TransformerVQ, TransformerVQConfig
from transformer_vq.models.conv import ShortConvolution
from transformer_vq.models.describe import describe
from transformer_vq.models.place import locate
from transformer_vq.training.optimizers import hidden_matrices

WIDTH = 3
TOKEN = st.tuples(st.integers(0, 1), st.booleans())  # document, real
TEXT = st.lists(TOKEN, min_size=1, max_size=9)


def convolution(taps: int) -> ShortConvolution:
    return ShortConvolution(WIDTH, taps, torch.Generator().manual_seed(0)).double()


def by_hand(y: torch.Tensor, row: list[tuple[int, bool]], weight: torch.Tensor) -> torch.Tensor:
    """The definition, for one row: a change of id among real tokens starts a document."""
    out, document = y.clone(), []  # its inputs so far
    taps, last = weight.shape[2], None
    for t, (identity, real) in enumerate(row):
        if not real:
            continue
        document = document if identity == last else []
        document, last = [*document, y[t]], identity
        for d, x in enumerate(reversed(document[-taps:])):
            out[t] = out[t] + weight[:, 0, taps - 1 - d] * x
    return out


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 5), TEXT, st.data())
def test_equals_the_definition_however_the_text_is_cut(taps, row, data):
    net, T = convolution(taps), len(row)
    y = torch.randn(1, T, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    segments, mask = (torch.tensor([list(column)]) for column in zip(*row, strict=True))
    cuts = sorted(data.draw(st.sets(st.integers(1, T - 1))) if T > 1 else [])
    got, inputs, where = [], None, (torch.zeros(1, dtype=torch.int64),) * 2
    for first, last in zip([0, *cuts], [*cuts, T], strict=True):
        part = slice(first, last)
        places, *where = locate((1, last - first), where, segments[:, part], mask[:, part])
        mixed, inputs = net(y[:, part], inputs, places, mask[:, part])
        got.append(mixed)
    want = by_hand(y[0], row, net.weight)
    assert_same({"c": torch.cat(got, 1)[0][mask[0]]}, {"c": want[mask[0]]}, 1e-12) if mask.any() else None
    assert inputs.shape == (1, taps - 1, WIDTH)


def test_gradients_equal_the_definition_and_none_reaches_an_earlier_call():
    net, row = convolution(3), [(0, True)] * 4 + [(1, True)] * 3
    y = torch.randn(1, 7, WIDTH, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    mixed, inputs = net(y, None, places, None)
    got = torch.autograd.grad(mixed.square().sum(), [y, net.weight])
    want = torch.autograd.grad(by_hand(y[0], row, net.weight).square().sum(), [y, net.weight])
    assert_same(dict(zip("yw", got, strict=True)), dict(zip("yw", want, strict=True)), 1e-12)
    assert not inputs.requires_grad


def model(**changes) -> TransformerVQ:
    sizes = {"vocab_size": 11, "layers": 2, "width": 8, "key_dim": 4, "value_dim": 4, "window": 3, "block_len": 2}
    quantizer = {"kind": "vq", "codes": 4}
    return TransformerVQ(TransformerVQConfig(**sizes, conv=3, quantizer=quantizer, **changes), seed=0)


def test_without_it_nothing_changes():
    """A model without the convolution has the weights it always had, and one with zero weights computes the same."""
    with_it, without = model(), TransformerVQ(model().config.model_copy(update={"conv": 0}), seed=0)
    assert {n for n, _ in without.named_parameters()} == {n for n, _ in with_it.named_parameters() if ".conv." not in n}
    for name, parameter in without.named_parameters():
        assert torch.equal(parameter, with_it.get_parameter(name))
    tokens = torch.arange(22).view(2, 11) % 11
    assert not torch.equal(with_it(tokens).logits, without(tokens).logits)
    with torch.no_grad():
        for layer in with_it.layers:
            layer.conv.weight.zero_()
    assert torch.equal(with_it(tokens).logits, without(tokens).logits)


@torch.no_grad()
def test_rows_restart_and_repeat_with_their_inputs():
    net, tokens = model().double().eval(), torch.arange(24).view(3, 8) % 11
    state = net(tokens[:, :5]).state
    rows = torch.tensor([2, 0, 0])
    assert torch.allclose(net(tokens[rows, 5:], state=state.select_rows(rows)).logits, net(tokens).logits[rows, 5:])
    anew = net(tokens[:, 5:], state=state.reset_rows(torch.tensor([False, True, False]))).logits
    assert torch.allclose(anew[1], net(tokens[1:2, 5:]).logits[0])


def test_recomputation_gives_the_same_gradients():
    tokens, found = torch.arange(24).view(2, 12) % 11, []
    for recompute in (False, True):
        net = model(checkpoint_activations=recompute).double()
        net(tokens, labels=tokens).loss.backward()
        found.append({name: p.grad for name, p in net.named_parameters()})
    assert_same(found[1], found[0], 1e-12)


def test_it_is_counted_and_is_no_matrix_for_muon():
    config = model().config
    with_it, without = describe(config, 8), describe(config.model_copy(update={"conv": 0}), 8)
    assert with_it["parameters"] - without["parameters"] == 2 * 8 * 3
    assert with_it["state_numbers"] - without["state_numbers"] == 2 * 2 * 8
    assert with_it["flops_per_token"] - without["flops_per_token"] == 2 * 2 * 8 * 3
    assert not any("conv" in name for name in hidden_matrices(model()))


@pytest.mark.parametrize("taps", [-1, 65, 2.5])
def test_a_width_that_is_none(taps):
    with pytest.raises(ValueError, match="conv"):
        TransformerVQConfig(vocab_size=11, conv=taps)
