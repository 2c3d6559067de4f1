"""Sampling: what is drawn from given logits, and that carried state and padding change nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_evaluation import tiny_model

from transformer_vq.evaluation import generation as module
from transformer_vq.evaluation.generation import generate, keep_nucleus, sample

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [5], [3, 3, 3, 8]]


def naive(model, prompt, steps, seed, temperature=1.0):
    """The definition: read everything anew for every token, one row, no state."""
    text, draw = list(prompt), torch.Generator().manual_seed(seed)
    model.eval()
    with torch.no_grad():
        for _ in range(steps):
            probabilities = (model(torch.tensor([text])).logits[0, -1] / temperature).softmax(-1)
            ordered, tokens = probabilities.sort(descending=True, stable=True)
            u = torch.rand(1, generator=draw)
            text.append(int(tokens[(ordered.cumsum(0) <= u).sum()]))
    return text[len(prompt) :]


@pytest.mark.parametrize("kind", ["vq", "none"])
@pytest.mark.parametrize("position", ["xl", "rotary"])
def test_carried_state_gives_what_reading_everything_anew_gives(kind, position):
    model = tiny_model(kind, position=position)
    got = generate(model, PROMPTS, max_tokens=24, seed=7)
    assert got == [naive(model, prompt, 24, seed=7 + row) for row, prompt in enumerate(PROMPTS)]


def test_a_row_does_not_depend_on_its_neighbours():
    model = tiny_model()
    together = generate(model, PROMPTS, max_tokens=16, seed=3, top_k=20, top_p=0.95, temperature=0.8)
    alone = [
        generate(model, [prompt], max_tokens=16, seed=3 + row, top_k=20, top_p=0.95, temperature=0.8)[0]
        for row, prompt in enumerate(PROMPTS)
    ]
    assert together == alone
    assert len({tuple(text) for text in generate(model, [[1]] * 4, max_tokens=16)}) == 4  # and rows differ


def test_a_long_prompt_read_in_pieces_gives_the_same(monkeypatch):
    model = tiny_model()
    prompts = [list(range(30)), [4, 5]]
    whole = generate(model, prompts, max_tokens=8)
    monkeypatch.setattr(module, "PREFILL", 7)
    assert generate(model, prompts, max_tokens=8) == whole


def test_temperature_zero_is_greedy_whatever_the_seed():
    model = tiny_model()
    greedy = generate(model, PROMPTS, max_tokens=6, temperature=0, seed=1)
    assert greedy == generate(model, PROMPTS, max_tokens=6, temperature=0, seed=2)
    assert greedy == generate(model, PROMPTS, max_tokens=6, top_k=1)
    with torch.no_grad():
        model.eval()
        assert greedy[0][0] == int(model(torch.tensor([PROMPTS[0]])).logits[0, -1].argmax())


def test_on_token_hears_every_step_and_the_mode_is_given_back():
    model, heard = tiny_model(), []
    model.train()
    texts = generate(model, PROMPTS, max_tokens=5, on_token=heard.append)
    assert [list(row) for row in zip(*heard, strict=True)] == texts
    assert model.training


def test_an_empty_prompt_begins_with_the_start_token_or_is_refused():
    model = tiny_model()
    assert generate(model, [[], [9]], max_tokens=5, start=9)[0] == generate(model, [[9]], max_tokens=5)[0]
    with pytest.raises(ValueError, match="start"):
        generate(model, [[]], max_tokens=5)
    assert generate(model, [], max_tokens=5) == []
    assert generate(model, [[1]], max_tokens=0) == [[]]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_k": 0}, "top_k = 0"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"max_tokens": -1}, "max_tokens = -1"),
    ],
)
def test_values_out_of_range_are_named(setting, words):
    with pytest.raises(ValueError, match=words):
        generate(tiny_model(), [[1]], **{"max_tokens": 3, **setting})


# What is drawn


def test_sampling_follows_the_distribution():
    torch.manual_seed(0)
    logits = torch.tensor([0.1, 2.0, -1.0, 0.7])
    grid = (torch.arange(10_000) + 0.5) / 10_000  # inverting a distribution at an even grid gives its own frequencies
    drawn = sample(logits.expand(10_000, -1), grid, temperature=1.0, top_k=None, top_p=None)
    frequencies = torch.bincount(drawn, minlength=4) / 10_000
    torch.testing.assert_close(frequencies, logits.softmax(-1), atol=2e-4, rtol=0)


def test_top_k_draws_only_the_likeliest():
    logits = torch.tensor([0.1, 2.0, -1.0, 0.7]).expand(1000, -1)
    drawn = sample(logits, torch.linspace(0, 0.9999, 1000), temperature=1.0, top_k=2, top_p=None)
    assert set(drawn.tolist()) == {1, 3}


def nucleus_in_words(probabilities, p):
    """From the least likely upward: a token stays once the sum up to and with it exceeds 1 - p; the likeliest stays."""
    order = sorted(range(len(probabilities)), key=lambda i: probabilities[i])
    kept, total = set(), 0.0
    for i in order:
        total += probabilities[i]
        if total > 1 - p:
            kept.add(i)
    return kept | {order[-1]}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8, unique=True), st.integers(1, 99))
def test_the_nucleus_is_the_papers(weights, percent):
    probabilities = torch.tensor(sorted(weights, reverse=True), dtype=torch.float64)
    probabilities = probabilities / probabilities.sum()
    p = (percent + 0.123) / 100  # off the sums of whole numbers, where rounding would decide
    kept = keep_nucleus(probabilities[None], p)[0].nonzero().flatten().tolist()
    assert set(kept) == nucleus_in_words(probabilities.tolist(), p)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_no_draw_leaves_the_kept_tokens(uniform):
    logits = torch.full((3, 1000), -50.0)
    logits[:, 17] = 50.0
    assert sample(logits, torch.full((3,), uniform), 1.0, None, 0.9).tolist() == [17] * 3
    ties = torch.zeros(1, 7)
    assert 0 <= sample(ties, torch.tensor([uniform]), 1.0, None, None).item() < 7


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=9),
    st.sampled_from([5e-324, 1e-300, 1e-45, 1e-30, 1.0, 1e30, 1e300, float("inf")]),
    st.floats(0, 1, exclude_max=True, width=32),
    st.booleans(),
)
def test_every_temperature_has_its_limit(values, temperature, uniform, impossible):
    """Near 0 the likeliest, near infinity all alike but what has no probability at all."""
    logits = torch.tensor([[*values, *([-torch.inf] if impossible else [])]])
    got = sample(logits, torch.tensor([uniform]), temperature, None, None).item()
    assert got < len(values)
    if temperature < 1e-20:
        assert logits[0, got] == logits.max()
    if temperature > 1e20:
        shares = (torch.arange(len(values)) + 0.5) / len(values)
        rows = logits.expand(len(values), -1)
        assert sorted(sample(rows, shares, temperature, None, None).tolist()) == list(range(len(values)))
