"""Transformers' `generate` and our cache of constant size: what is read once need not be read again."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_same

from transformer_vq.config import ConfigError

transformers = pytest.importorskip("transformers")
from hub_models import EACH, model, text  # noqa: E402

from transformer_vq.hub import TransformerVQCache, TransformerVQHubConfig  # noqa: E402


@EACH
@torch.no_grad()
def test_greedy_equals_a_loop_without_a_cache(changes):
    net, prompt = model(**changes), text(2, 7)
    want = prompt
    for _ in range(12):
        want = torch.cat([want, net(want, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    for use_cache in (True, False):
        assert torch.equal(net.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=use_cache), want)


@EACH
@torch.no_grad()
def test_left_padding_is_invisible(changes):
    net = model(**changes)
    rows = [text(1, n, seed=n)[0] for n in (3, 9, 5)]
    padded = torch.stack([torch.cat([torch.zeros(9 - len(row), dtype=torch.int64), row]) for row in rows])
    mask = torch.stack([torch.arange(9) >= 9 - len(row) for row in rows]).long()
    got = net.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 9:]
    for row, continuation in zip(rows, got, strict=True):
        assert torch.equal(net.generate(row[None], max_new_tokens=8, do_sample=False)[0, len(row) :], continuation)


MODES = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "num_return_sequences": 3, "do_sample": False},
    "samples": {"do_sample": True, "num_return_sequences": 4, "temperature": 1.5, "top_k": 0},
    "sampled beams": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_every_mode_gives_with_the_cache_what_it_gives_without(mode, padded):
    """Beams move and repeat the cache's rows; without it everything is read again each time."""
    net, prompt = model(), text(2, 6)
    mask = torch.ones_like(prompt)
    mask[1, :3] = 1 - int(padded)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(net.generate(prompt, attention_mask=mask, max_new_tokens=6, use_cache=use_cache, **mode))
    assert torch.equal(*found) and found[0].shape == (2 * mode.get("num_return_sequences", 1), 12)
    if mode.get("num_return_sequences"):
        assert len({tuple(row.tolist()) for row in found[0][: mode["num_return_sequences"]]}) > 1


@torch.no_grad()
def test_sampling_follows_the_models_own_probabilities():
    net, prompt = model(), text(1, 6)
    torch.manual_seed(0)
    drawn = net.generate(prompt, max_new_tokens=1, do_sample=True, num_return_sequences=4000, top_k=0)[:, -1]
    share = torch.bincount(drawn, minlength=29) / 4000
    assert (share - net(prompt).logits[0, -1].softmax(-1)).abs().max() < 5 * (0.25 / 4000) ** 0.5


@torch.no_grad()
def test_a_stream_gets_every_token_as_it_is_made():
    class Listener(transformers.generation.streamers.BaseStreamer):
        """Keeps what it hears."""

        def __init__(self):
            self.heard, self.ended = [], False

        def put(self, value):
            self.heard.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    listener, prompt = Listener(), text(1, 5)
    want = model().generate(prompt, max_new_tokens=6, do_sample=False)[0].tolist()
    model().generate(prompt, max_new_tokens=6, do_sample=False, streamer=listener)
    assert listener.heard == [want[:5], *([token] for token in want[5:])] and listener.ended


@torch.no_grad()
def test_a_cache_goes_on_is_copied_and_keeps_its_size():
    net, tokens = model(), text(2, 30)
    out = net(tokens[:, :11], use_cache=True)
    kept = copy.deepcopy(out.cache)
    assert out.cache.get_seq_length() == 11
    rest = net(tokens[:, 11:], cache=out.cache)
    whole = net(tokens)
    assert_same({"x": rest.logits}, {"x": whole.logits[:, 11:]}, 1e-5)
    again = net(tokens[:, 11:], cache=kept)
    assert torch.equal(again.logits, rest.logits)  # the first continuation wrote nothing into the copy

    def size(cache):
        return sum(x.numel() for layer in cache.state.layers for x in layer)

    assert size(out.cache) == size(net(text(2, 300), use_cache=True).cache)
    kept.reset()
    assert kept.get_seq_length() == 0
    with pytest.raises(ValueError, match="cannot be cropped"):
        out.cache.crop(-1)


@torch.no_grad()
def test_generation_continues_from_a_passed_cache():
    net, tokens = model(), text(1, 20)
    want = net.generate(tokens, max_new_tokens=6, do_sample=False)
    cache = net(tokens[:, :12], use_cache=True).cache
    assert torch.equal(net.generate(tokens, cache=cache, max_new_tokens=6, do_sample=False), want)
    result = net.generate(tokens, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    more = net.generate(result.sequences, cache=result.cache, max_new_tokens=3, do_sample=False)
    assert torch.equal(more, want)


@EACH
@torch.no_grad()
def test_rows_of_a_cache_are_moved_repeated_and_selected(changes):
    net, tokens, more = model(**changes), text(3, 9), text(1, 4, seed=1).expand(3, -1)
    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        cache = net(tokens, use_cache=True).cache
        change(cache)
        got = net(more[:1].expand(len(rows), -1), cache=cache).logits
        want = net(torch.cat([tokens, more], 1)).logits[rows, 9:]
        assert_same({"x": got}, {"x": want}, 1e-5)


@EACH
@torch.no_grad()
def test_a_prompt_may_be_read_in_pieces_with_or_without_padding_before_it(changes):
    net, tokens = model(**changes), text(2, 12)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    whole = net(tokens, attention_mask=mask, use_cache=True)
    assert torch.equal(whole.logits, net(tokens, attention_mask=mask, use_cache=False).logits)
    cache, pieces = None, []
    for first, last in ((0, 3), (3, 4), (4, 12)):  # the first piece of row 0 is padding alone
        out = net(tokens[:, first:last], attention_mask=mask[:, :last], cache=cache, use_cache=True)
        cache, pieces = out.cache, [*pieces, out.logits]
    real = mask.bool()
    assert_same({"x": torch.cat(pieces, 1)[real]}, {"x": whole.logits[real]}, 1e-5)
    assert cache.get_seq_length() == 12 and cache.get_mask_sizes(1) == (13, 0)


def test_what_does_not_fit_is_refused():
    net = model()
    cache = net(text(2, 5), use_cache=True).cache
    with pytest.raises(ValueError, match="cache has 2 rows; the input has 3"):
        net(text(3, 5), cache=cache)
    with pytest.raises(ValueError, match="cache is of a model with 2 layers; this one has 1"):
        model(layers=1)(text(2, 5), cache=cache)
    for changes, reason in (
        ({"conv": 3}, "conv = 0; this one has 3"),
        ({"per_layer": {"1": {"kind": "none"}}}, "its layer 1 keeps codes, this one's every key"),
        ({"window": 5}, r"its layer 0 has \(1, 8, 8, 3\) .*window\), this one's \(1, 8, 8, 5\)"),
        ({"heads": 2}, r"this one's \(2, 8, 8, 3\)"),
        (
            {"quantizer": {"kind": "vq", "codes": 8}},
            r"state.count has shape \(2, 1, 512\); .* \(2, 1, 8\)",
        ),
    ):
        with pytest.raises(ValueError, match=reason):
            model(**changes)(text(2, 5), cache=cache)
    with pytest.raises(ValueError, match="cache has 2 rows; the input has 1"):
        net.generate(text(1, 8), cache=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="DynamicCache"):
        net(text(2, 5), cache=transformers.DynamicCache())
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        net()
    with pytest.raises(ConfigError, match="widht: no such key; did you mean width"):
        TransformerVQHubConfig(model={"widht": 3})
    assert isinstance(cache, TransformerVQCache)
