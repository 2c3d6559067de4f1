"""Decoding in place by kernels, interpreted, against the way that copies; test_decoding.py starts the process."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_same
from models.test_decoding import model

from transformer_vq.evaluation.generation import generate
from transformer_vq.models.decoding import Decoder, Decoding
from transformer_vq.ops.attention.ring import Ring

QUICK = ("xl, heads", "rotary, heads", "exact keys")
REST = ("scalar", "none", "adopted", "conv", "no cache", "no window", "one full layer")


def tensors(state):
    found = {"position": state.position}
    for i, layer in enumerate(state.layers):
        found |= {f"{i}.{name}": x.double() for name, x in layer._asdict().items()}
    return found


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)])
def test_in_place_gives_what_copies_give(name):
    made = model(name)
    tokens = torch.randint(11, (2, 9))
    found = []
    with torch.no_grad():
        state = made(tokens[:, :5]).state
        for in_place in (False, True):
            with made.frozen(in_place=in_place):
                now, logits = state, []
                for t in range(5, 9):
                    out = made(tokens[:, t : t + 1], state=now)
                    now = out.state
                    logits.append(out.logits)
                assert isinstance(now, Decoding)
                assert any(isinstance(x, Ring) for x in now.layers_now) == in_place
                found.append({"logits": torch.cat(logits, 1)} | tensors(now))
    assert_same(found[1], found[0], 1e-10)


def test_sixteen_bits_in_place():
    """The ring holds keys and values in the weights' type; both ways round at most once more than the other."""
    made = model("rotary, heads").half()
    exact, tokens = copy.deepcopy(made).double(), torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(1))
    errors, found = {}, {}
    with torch.no_grad():
        start = made(tokens[:, :5]).state
        true, state = [], start
        for t in range(5, 9):
            out = exact(tokens[:, t : t + 1], state=state)
            true, state = [*true, out.logits], out.state
        for in_place in (False, True):
            with made.frozen(in_place=in_place):
                now, logits = start, []
                for t in range(5, 9):
                    out = made(tokens[:, t : t + 1], state=now)
                    now = out.state
                    logits.append(out.logits)
                assert any(isinstance(x, Ring) for x in now.layers_now) == in_place
                errors[in_place] = (torch.cat(logits) - torch.cat(true)).norm() / torch.cat(true).norm()
                found[in_place] = [[x.dtype for x in layer] for layer in now.layers]
    assert found[True] == found[False]
    assert errors[True] < max(1.5 * errors[False], 2e-3)


def test_an_earlier_state_is_refused():
    made = model("xl, heads")
    token = torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad(), made.frozen(in_place=True):
        first = made(token).state
        made(token, state=first)
        with pytest.raises(ValueError, match="has gone on by 1 tokens"):
            made(token, state=first)


def test_generation_decodes_in_place(monkeypatch):
    made, asked = model("rotary, heads"), []
    usual = Decoder.__init__
    monkeypatch.setattr(Decoder, "__init__", lambda self, *x: asked.append(x[-1]) or usual(self, *x))
    text = generate(made, [[1, 2, 3], [4]], 4, seed=3)
    monkeypatch.setattr("transformer_vq.models.language_model.usable", lambda device: False)
    assert generate(made, [[1, 2, 3], [4]], 4, seed=3) == text
    assert asked == [True, False]
