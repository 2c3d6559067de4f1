"""Our models as Transformers sees them: the same numbers, saved, loaded, generated from, and trained by others."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same

from transformer_vq import TransformerVQ

transformers = pytest.importorskip("transformers")
from hub_models import EACH, VOCAB, config, model, text  # noqa: E402

from transformer_vq.hub import TransformerVQForCausalLM  # noqa: E402


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


@EACH
def test_in_bf16_numbers_are_near_and_codebooks_stay_wide(tmp_path, changes):
    one, tokens = model(**changes), text(2, 20)
    one.save_pretrained(tmp_path)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    made = transformers.AutoModelForCausalLM.from_config(one.config, dtype=torch.bfloat16)
    for net in (half, made, model(**changes).to(torch.bfloat16)):
        assert net.lm_head.weight.dtype == torch.bfloat16
        assert {x.dtype for name, x in net.named_buffers() if "ema_" in name} <= {torch.float32}
    for name, tensor in one.named_buffers():
        if "ema_" in name:
            assert torch.equal(half.get_buffer(name), tensor)  # no digit was lost
    with torch.no_grad():
        want, got = one(tokens).logits, half.eval()(tokens).logits
    assert got.dtype == torch.float32
    assert (got - want).pow(2).mean() < 0.05 * want.pow(2).mean()  # a key near a border may take another code
    half.train()(tokens, labels=tokens).loss.backward()
    torch.optim.SGD(half.parameters(), lr=0.1).step()
    half.eval().save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for name, tensor in half.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor) and again.state_dict()[name].dtype == tensor.dtype, name


@EACH
@torch.no_grad()
def test_a_device_map_places_layers_and_keeps_some_on_disk(tmp_path, changes):
    one, tokens = model(**changes), text(2, 12)
    one.save_pretrained(tmp_path / "saved")
    places = {"model.steps": "cpu", "lm_head": "cpu"} | {
        f"model.backbone.{name}": place
        for name, place in (("embedding", "cpu"), ("layers.0", "cpu"), ("layers.1", "disk"), ("norm", "cpu"))
    }
    if one.config.settings().absolute_positions:
        places["model.backbone.absolute_scale"] = "cpu"
    for where in (places, "auto", {"": "cpu"}):
        net = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "saved", device_map=where, offload_folder=tmp_path / "disk"
        )
        assert any(p.is_meta for p in net.parameters()) == (where is places)
        assert torch.equal(net(tokens).logits, one(tokens).logits)
        want = one.generate(tokens, max_new_tokens=4, do_sample=False)
        assert torch.equal(net.generate(tokens, max_new_tokens=4, do_sample=False), want)


@torch.no_grad()
def test_packed_documents_are_kept_apart():
    net, tokens = model(), text(1, 20)
    got = net(tokens, cu_seqlens=torch.tensor([0, 8, 15, 20])).logits
    for first, last in ((0, 8), (8, 15), (15, 20)):
        assert_same({"x": got[:, first:last]}, {"x": net(tokens[:, first:last]).logits}, 1e-5)
    index = torch.tensor([[0] * 8 + [1] * 7 + [2] * 5])
    places = torch.cat([torch.arange(n) for n in (8, 7, 5)])[None]
    assert torch.equal(net(tokens, seq_idx=index).logits, got)
    assert torch.equal(net(tokens, cu_seq_lens_q=torch.tensor([0, 8, 15, 20], dtype=torch.int32)).logits, got)
    assert torch.equal(net(tokens, position_ids=places).logits, got)
    assert torch.equal(net(tokens, position_ids=torch.arange(20)[None]).logits, net(tokens).logits)
    two = torch.cat([tokens, tokens])
    assert_same({"x": net(two, position_ids=places).logits[1:]}, {"x": got}, 1e-5)
    embedded = net.get_input_embeddings()(tokens)
    assert torch.equal(net(inputs_embeds=embedded).logits, net(tokens).logits)
    for wrong, reason in (
        ({"cu_seqlens": torch.tensor([0, 20])}, "documents packed into one row; input has 2"),
        ({"position_ids": places[:, 1:]}, r"position_ids has shape \(1, 19\); \(2, 20\) is expected"),
        ({"attention_mask": torch.ones(1, 20)}, r"attention_mask has shape \(1, 20\); \(2, 20\) is expected"),
        ({"labels": tokens}, r"labels has shape \(1, 20\); \(2, 20\) is expected"),
    ):
        with pytest.raises(ValueError, match=reason):
            net(two, **wrong)


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


def test_gradient_checkpointing_gives_the_same_gradients_and_repeats_every_layer():
    tokens, found, calls = text(2, 12), [], []
    for enable in (False, True):
        net = model().train()
        if enable:
            net.activation_checkpointing_enable()
        net.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(enable))
        net(tokens, labels=tokens).loss.backward()
        found.append({name: p.grad for name, p in net.named_parameters()})
    assert_same(found[1], found[0], 1e-5)
    assert calls.count(False) == 1 and calls.count(True) == 2


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
