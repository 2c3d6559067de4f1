"""Evaluation against its definition: one forward pass over the text that a token may see."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from models_for_evaluation import tiny_model, tiny_split

from transformer_vq.data import TokenFile
from transformer_vq.evaluation import language
from transformer_vq.evaluation.language import default_context, evaluate


def token_nats(model, tokens, segments=None):
    """-log p of every token but the first, read in one call: (N - 1,)."""
    model.eval()
    with torch.no_grad():
        logits = model(tokens[None, :-1], segments=None if segments is None else segments[None, :-1]).logits[0]
    return -logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]


def tensor(split):
    return torch.from_numpy(split.tokens.astype("int64"))


@pytest.mark.parametrize("kind", ["vq", "fsq", "none"])
def test_full_context_is_one_pass_over_everything(kind, monkeypatch):
    monkeypatch.setattr(language, "PIECE", 7)  # so that the state is carried many times
    model, split = tiny_model(kind), tiny_split(60)
    got = evaluate(model, split, "full", batch_size=1)
    nats = token_nats(model, tensor(split))
    assert got["loss"] == pytest.approx(nats.mean().item(), rel=1e-10)
    assert got["bits_per_byte"] == pytest.approx(nats.sum().item() / math.log(2) / 59, rel=1e-10)
    assert got["bits_per_token"] == pytest.approx(got["bits_per_byte"], rel=1e-12)  # a token is a byte
    assert got["perplexity"] == pytest.approx(math.exp(nats.mean().item()), rel=1e-10)
    assert got["word_perplexity"] == pytest.approx(math.exp(nats.sum().item() / split.words), rel=1e-10)
    assert (got["context"], got["tokens"], got["bytes"]) == ("full", 59, 59)


@pytest.mark.parametrize("length", [2, 9, 16, 17, 60, 61])
@pytest.mark.parametrize("width", [1, 2, 7, 16, 100])
def test_a_window_scores_every_token_once_with_at_least_half_of_it_before(length, width):
    model, split = tiny_model(), tiny_split(length, documents=(0,))
    tokens, scored = tensor(split), torch.full((length,), -1.0, dtype=torch.float64)
    got = evaluate(model, split, width, batch_size=3)
    nats, begin, done = 0.0, 0, 1
    while done < length:  # windows of `width`, the last one moved back to end with the text
        begin = min(begin, max(length - 1 - width, 0))
        seen = tokens[begin : begin + width + 1]
        for place, value in enumerate(token_nats(model, seen), start=begin + 1):
            if place >= done:
                assert place - begin >= min(place, width // 2), "too little context"
                assert scored[place] < 0, "scored twice"
                scored[place] = value
                nats += value.item()
        done = begin + len(seen)
        begin += max(1, width // 2)
    assert (scored[1:] >= 0).all()
    assert got["loss"] == pytest.approx(nats / (length - 1), rel=1e-10)
    assert got["tokens"] == length - 1


@pytest.mark.parametrize("context", ["full", 8])
def test_numbers_do_not_depend_on_the_batch_size(context):
    model, split = tiny_model(), tiny_split(100)
    one, many = (evaluate(model, split, context, batch_size=size) for size in (1, 16))
    assert one.pop("context") == many.pop("context")
    assert one == pytest.approx(many, rel=1e-10)


def test_more_context_than_the_text_is_full_context():
    model, split = tiny_model(), tiny_split(50)
    full, wide = evaluate(model, split, "full"), evaluate(model, split, 1000)
    assert wide.pop("context") == 1000
    assert full.pop("context") == "full"
    assert wide == pytest.approx(full, rel=1e-10)


def test_the_cache_is_left_out_by_a_short_context():
    model, split = tiny_model(), tiny_split(100)
    assert abs(evaluate(model, split, "full")["loss"] - evaluate(model, split, 4)["loss"]) > 1e-6


@pytest.mark.parametrize("context", ["full", 1000])
def test_documents_are_read_apart_when_asked(context, monkeypatch):
    monkeypatch.setattr(language, "PIECE", 11)
    model, split = tiny_model(), tiny_split(60, documents=(0, 20, 37))
    segments = torch.tensor([0] * 20 + [1] * 17 + [2] * 23)
    got = evaluate(model, split, context, batch_size=1, reset_documents=True)["loss"]
    assert got == pytest.approx(token_nats(model, tensor(split), segments).mean().item(), rel=1e-10)
    assert got != pytest.approx(evaluate(model, split, context)["loss"], rel=1e-6)


def test_max_tokens_scores_the_first_ones():
    model, split = tiny_model(), tiny_split(60)
    got = evaluate(model, split, "full", max_tokens=25)
    assert got["loss"] == pytest.approx(token_nats(model, tensor(split)[:26]).mean().item(), rel=1e-10)
    assert (got["tokens"], got["bytes"]) == (25, 25)
    assert evaluate(model, split, "full", max_tokens=1000) == evaluate(model, split, "full")


def lossy(length: int = 60) -> TokenFile:
    """Tokens under which lie 0 to 6 bytes and 0 to 2 words, and whose decoded text is another."""
    draw = np.random.default_rng(3)
    covers, begins = draw.integers(0, 7, length).astype(np.uint8), draw.integers(0, 3, length).astype(np.uint8)
    file = tiny_split(length, documents=(0,))
    return replace(file, bytes=int(covers.sum()), words=int(begins.sum()), covers=covers, begins=begins)


@pytest.mark.parametrize("context", ["full", 8])
@pytest.mark.parametrize("most", [1, 2, 25, 58, 59, 1000, None])
def test_bits_per_byte_count_the_bytes_under_the_scored_tokens(context, most):
    model, split = tiny_model(), lossy()
    got = evaluate(model, split, context, max_tokens=most)
    scored = min(most or 59, 59)
    read = int(split.covers[1 : scored + 1].sum())
    assert (got["tokens"], got["bytes"]) == (scored, read)
    if read:
        assert got["bits_per_byte"] == pytest.approx(got["bits_per_token"] * scored / read, rel=1e-12)
    words = int(split.begins[: scored + 1].sum())
    assert got["word_perplexity"] == pytest.approx(math.exp(got["loss"] * scored / words), rel=1e-9)


def test_tokens_without_their_text_have_no_bits_per_byte():
    got = evaluate(tiny_model(), replace(tiny_split(60), bytes=None, words=0), max_tokens=20)
    assert got.keys() & {"bits_per_byte", "bytes", "word_perplexity"} == set()
    assert got["bits_per_token"] == pytest.approx(got["loss"] / math.log(2))


def test_progress_ends_with_all_tokens_and_the_mode_is_given_back():
    model, heard = tiny_model(), []
    model.train()
    evaluate(model, tiny_split(60), 8, batch_size=2, progress=lambda done, total: heard.append((done, total)))
    assert heard[-1] == (59, 59)
    assert heard == sorted(heard)
    assert model.training


def test_default_context_of_full_attention_is_the_training_length():
    assert default_context(tiny_model("vq"), 512) == "full"
    assert default_context(tiny_model("none"), 512) == 512
    assert default_context(tiny_model("vq", per_layer={"1": {"kind": "none"}}), 512) == 512


def test_a_split_with_nothing_to_predict_and_sizes_below_one_are_named():
    with pytest.raises(ValueError, match="nothing to predict"):
        evaluate(tiny_model(), tiny_split(1))
    for setting in ({"context": 0}, {"batch_size": 0}, {"max_tokens": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(setting))} = 0"):
            evaluate(tiny_model(), tiny_split(60), **setting)
