"""Our models as Transformers sees them: the same numbers, saved, loaded, generated from, and trained by others."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_same

from transformer_vq import TransformerVQ
from transformer_vq.config import ConfigError

transformers = pytest.importorskip("transformers")
from transformer_vq.hub import TransformerVQCache, TransformerVQForCausalLM, TransformerVQHubConfig  # noqa: E402

SIZES = {"layers": 2, "width": 16, "key_dim": 8, "value_dim": 8, "window": 3, "block_len": 4}
VARIANTS = {
    "gau": {"quantizer": {"kind": "vq", "codes": 8, "estimator": "rotation"}},
    "tied": {"tied_embedding": True, "logit_scale": 0.5, "quantizer": {"kind": "vq", "codes": 8}},
    "transformer": {"block": "transformer", "heads": 4, "kv_heads": 2, "position": "rotary", "conv": 3},
    "fsq-and-full": {"per_layer": {"0": {"kind": "fsq", "levels": [3, 3]}, "1": {"kind": "none"}}},
    "window-only": {"cache": False, "absolute_positions": True, "position": "scalar"},
}
EACH = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
VOCAB = 29


def config(**changes) -> TransformerVQHubConfig:
    return TransformerVQHubConfig(model={**SIZES, **changes}, vocab_size=VOCAB, seed=3)


def model(**changes) -> TransformerVQForCausalLM:
    return TransformerVQForCausalLM(config(**changes)).eval()


def text(B: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))


@EACH
@torch.no_grad()
def test_same_weights_and_numbers_as_ours(changes):
    theirs = model(**changes)
    ours = TransformerVQ(theirs.config.settings(), seed=3).eval()
    tokens = text(2, 20)
    want = ours(tokens, labels=torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1))
    got = theirs(tokens, labels=tokens)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.loss, want.loss_lm)  # in evaluation no quantizer's loss


@EACH
@torch.no_grad()
def test_saved_and_loaded_by_the_auto_classes(tmp_path, changes):
    one = model(**changes)
    one.model.backbone.quantizers[0].apply_codebook_statistics()
    one.save_pretrained(tmp_path)
    two = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(two, TransformerVQForCausalLM)
    assert {n: x.shape for n, x in two.state_dict().items()} == {n: x.shape for n, x in one.state_dict().items()}
    assert torch.equal(two(text(2, 20)).logits, one(text(2, 20)).logits)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(text(1, 9)).last_hidden_state, one.model(text(1, 9)).last_hidden_state)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16 and torch.isfinite(half(text(1, 9)).logits).all()


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


@torch.no_grad()
def test_beams_samples_and_several_sequences():
    net, prompt = model(), text(2, 6)
    beams = net.generate(prompt, max_new_tokens=6, num_beams=3, num_return_sequences=3, do_sample=False)
    without = net.generate(
        prompt, max_new_tokens=6, num_beams=3, num_return_sequences=3, do_sample=False, use_cache=False
    )
    assert torch.equal(beams, without) and beams.shape == (6, 12)
    torch.manual_seed(0)
    one = net.generate(prompt, max_new_tokens=6, do_sample=True, num_return_sequences=2)
    torch.manual_seed(0)
    assert torch.equal(one, net.generate(prompt, max_new_tokens=6, do_sample=True, num_return_sequences=2))


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
    kept.batch_select_indices(torch.tensor([1, 1]))
    kept.batch_repeat_interleave(2)
    assert kept.state.position.shape == (4,)
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


@torch.no_grad()
def test_packed_documents_are_kept_apart():
    net, tokens = model(), text(1, 20)
    got = net(tokens, cu_seqlens=torch.tensor([0, 8, 15, 20])).logits
    for first, last in ((0, 8), (8, 15), (15, 20)):
        assert_same({"x": got[:, first:last]}, {"x": net(tokens[:, first:last]).logits}, 1e-5)
    index = torch.tensor([[0] * 8 + [1] * 7 + [2] * 5])
    assert torch.equal(net(tokens, seq_idx=index).logits, got)
    embedded = net.get_input_embeddings()(tokens)
    assert torch.equal(net(inputs_embeds=embedded).logits, net(tokens).logits)


def test_codebooks_move_once_per_optimizer_step_also_with_accumulation():
    """Two micro-batches of a foreign loop move the codebook as one batch of our own does."""
    tokens = text(4, 12)
    one, two = model(quantizer={"kind": "vq", "codes": 8}).train(), model(quantizer={"kind": "vq", "codes": 8}).train()
    before = one.model.backbone.quantizers[0].codebook.clone()
    for net, parts in ((one, [tokens]), (two, tokens.split(2))):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for part in parts:
            (net(part, labels=part).loss / len(parts)).backward()
            assert torch.equal(net.model.backbone.quantizers[0].codebook, before)
        optimizer.step()
        assert int(net.model.steps) == 1
    after = one.model.backbone.quantizers[0].codebook
    assert not torch.equal(after, before)
    for name, tensor in one.state_dict().items():
        assert torch.allclose(tensor.double(), two.state_dict()[name].double(), rtol=1e-4, atol=1e-6), name


def test_commitment_reaches_the_loss_whoever_computes_it():
    tokens, gradients = text(2, 12), []
    for own in (True, False):
        net = model(quantizer={"kind": "vq", "codes": 8, "commit": 1.0}).train()
        out = net(tokens, labels=tokens if own else None)
        loss = out.loss
        if not own:
            loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        gradients.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    assert_same(gradients[1], gradients[0], 1e-4)
    plain = model(quantizer={"kind": "vq", "codes": 8, "commit": 0.0}).train()
    plain(tokens, labels=tokens).loss.backward()
    name = "model.backbone.layers.0.kvg_proj.weight"
    assert not torch.allclose(plain.get_parameter(name).grad, gradients[0][name])


def test_loss_over_items_in_batch_adds_up():
    tokens, net = text(4, 9), model().train()
    whole = net(tokens, labels=tokens).loss
    items = 4 * 8
    parts = sum(net(part, labels=part, num_items_in_batch=items).loss for part in tokens.split(1))
    assert torch.allclose(parts, whole, rtol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients():
    tokens, found = text(2, 12), []
    for enable in (False, True):
        net = model().train()
        if enable:
            net.activation_checkpointing_enable()
        net(tokens, labels=tokens).loss.backward()
        found.append({name: p.grad for name, p in net.named_parameters()})
    assert_same(found[1], found[0], 1e-5)


@EACH
def test_built_on_meta_and_filled_it_is_what_the_constructor_makes(changes):
    with torch.device("meta"):
        net = TransformerVQForCausalLM(config(**changes))
    assert all(p.is_meta for p in net.parameters())
    net.to_empty(device="cpu")
    net.tie_weights()
    net.post_init()
    want = model(**changes)
    for name, tensor in want.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor), name
    tokens = text(2, 10)
    assert torch.equal(net.eval()(tokens).logits, want(tokens).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_can_be_resized(tmp_path, tied):
    net = model(tied_embedding=tied)
    want = net(text(1, 9)).logits
    net.resize_token_embeddings(VOCAB + 4)
    assert net.config.settings().vocab_size == VOCAB + 4
    assert torch.equal(net(text(1, 9)).logits[..., :VOCAB], want)
    assert (net.lm_head.weight is net.get_input_embeddings().weight) == tied
    net.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(text(1, 9)).logits, net(text(1, 9)).logits)


def test_what_does_not_fit_is_refused():
    net = model()
    cache = net(text(2, 5), use_cache=True).cache
    with pytest.raises(ValueError, match="cache has 2 rows; the input has 3"):
        net(text(3, 5), cache=cache)
    with pytest.raises(ValueError, match="cache is of a model with 2 layers; this one has 1"):
        model(layers=1)(text(2, 5), cache=cache)
    with pytest.raises(ValueError, match="DynamicCache"):
        net(text(2, 5), cache=transformers.DynamicCache())
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        net()
    with pytest.raises(ConfigError, match="widht: no such key; did you mean width"):
        TransformerVQHubConfig(model={"widht": 3})
    assert isinstance(cache, TransformerVQCache)
