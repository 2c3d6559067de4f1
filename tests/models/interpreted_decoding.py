"""Decoding in place by kernels, interpreted, against the way that copies; test_decoding.py starts the process."""

from __future__ import annotations

import copy
import warnings
from typing import ClassVar

import pytest
import torch
from helpers import assert_same
from models.test_decoding import model

from transformer_vq.evaluation.generation import generate
from transformer_vq.models import decoding
from transformer_vq.models.decoding import Decoder, Decoding
from transformer_vq.ops.attention import ring as ring_module
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


class Played:
    """Stands for a graph: capturing changes no tensor; playing runs what was captured, and Python does not notice."""

    rings: ClassVar[list[Ring]] = []
    made_so_far = 0

    def __init__(self, run, tokens):
        type(self).made_so_far += 1
        self.run, self.tokens = run, tokens.clone()
        self.then = [ring.taken[0] for ring in self.rings]
        tensors = {id(x): x for ring in self.rings for x in ring if isinstance(x, torch.Tensor)}.values()
        before = [x.clone() for x in tensors]
        self.made = run(self.tokens)
        for x, old in zip(tensors, before, strict=True):
            x.copy_(old)
        for x in self.made:
            x.fill_(torch.nan)

    def __call__(self, tokens):
        self.tokens.copy_(tokens)
        now = [ring.taken[0] for ring in self.rings]
        for ring, then in zip(self.rings, self.then, strict=False):
            ring.taken[0] = then
        for x, new in zip(self.made, self.run(self.tokens), strict=True):
            x.copy_(new)
        for ring, taken in zip(self.rings, now, strict=True):
            ring.taken[0] = taken
        return self.made


@pytest.fixture
def graphs(monkeypatch):
    """Graphs where there are none."""
    opened = ring_module.open_ring
    monkeypatch.setattr(
        ring_module, "open_ring", lambda *x, **y: Played.rings.append(opened(*x, **y)) or Played.rings[-1]
    )
    monkeypatch.setattr(decoding, "possible", lambda device: True)
    monkeypatch.setattr(decoding, "Captured", Played)
    Played.rings.clear()
    Played.made_so_far = 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["xl, heads", pytest.param("rotary, heads", marks=pytest.mark.slow)])
def test_a_captured_step_reads_every_token_as_the_first(name, graphs):
    """Two loops in turns, each with a graph of its own, and what is asked of a token after the next one was read."""
    made, tokens = model(name), torch.randint(11, (2, 2, 7), generator=torch.Generator().manual_seed(1))
    long_way = copy.copy(made)
    with made.frozen(in_place=True):
        states, wanted, outs = [None, None], [None, None], [[], []]
        for t in range(7):
            for loop in range(2):
                token = tokens[loop, :, t : t + 1]
                out, want = made(token, state=states[loop]), long_way(token, state=wanted[loop])
                assert_same({"logits": out.logits}, {"logits": want.logits}, 1e-10)
                states[loop], wanted[loop] = out.state, want.state
                outs[loop].append((out, want))
        assert Played.made_so_far == 2
        for out, want in (pair for loop in outs for pair in loop):
            assert_same({"": out.loss_commit}, {"": want.loss_commit}, 1e-10)
        for state, want in zip(states, wanted, strict=True):
            assert_same(tensors(state), tensors(want), 1e-10)
        with pytest.raises(ValueError, match="has gone on by 1 tokens"):
            made(token, state=outs[0][-2][0].state)


@torch.no_grad()
def test_what_cannot_be_captured_is_read_launch_by_launch(graphs, monkeypatch):
    class Refused(Played):
        def __init__(self, run, tokens):
            super().__init__(run, tokens)
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decoding, "Captured", Refused)
    made, tokens = model("xl, heads"), torch.randint(11, (1, 4))
    whole, state = made(tokens).logits, None
    with made.frozen(in_place=True), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for t in range(4):
            out = made(tokens[:, t : t + 1], state=state)
            state = out.state
            assert_same({"": out.logits[:, 0]}, {"": whole[:, t]}, 1e-10)
    assert [str(w.message) for w in told if w.category is UserWarning] == [
        "decoding goes on launch by launch, without a graph: operation not permitted when stream is capturing"
    ]


@torch.no_grad()
@pytest.mark.parametrize("name", ["conv", "one full layer"])
def test_a_step_with_more_memory_than_its_rings_is_not_captured(name, graphs):
    made, token, state = model(name), torch.zeros(1, 1, dtype=torch.int64), None
    with made.frozen(in_place=True):
        for _ in range(3):
            state = made(token, state=state).state
    assert Played.made_so_far == 0


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
