"""The language model as a whole: what it promises about order, documents, padding, state, losses, types and seeds."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same

from transformer_vq import TransformerVQ, TransformerVQConfig
from transformer_vq.ops.attention import AttentionState, FullState

VOCAB = 17
SIZES = {
    "vocab_size": VOCAB,
    "layers": 2,
    "width": 16,
    "heads": 4,
    "key_dim": 4,
    "value_dim": 6,
    "window": 5,
    "block_len": 4,
    "quantizer": {"kind": "vq", "codes": 8},
}
VARIANTS = {
    **{
        f"{block}-{position}": {"block": block, "position": position}
        for block in ("gau", "transformer")
        for position in ("xl", "scalar", "rotary", "none")
    },
    "gau-multi-query": {"kv_heads": 1, "absolute_positions": True, "tied_embedding": True},
    "transformer-grouped": {"block": "transformer", "kv_heads": 2, "position": "rotary", "absolute_positions": True},
    "window-only": {"cache": False},
    "full": {"quantizer": {"kind": "none"}},
    "full-scalar": {"quantizer": {"kind": "none"}, "position": "scalar"},
    "full-rotary": {"quantizer": {"kind": "none"}, "position": "rotary", "kv_heads": 2},
    "full-window-only": {"quantizer": {"kind": "none"}, "cache": False},
    "mixed": {"per_layer": {"1": {"kind": "none"}}},
    "fsq": {"quantizer": {"kind": "fsq", "levels": [3, 3]}},
    "one-code": {"quantizer": {"kind": "vq", "codes": 1}},
    "no-window": {"window": 0},
    "conv": {"conv": 4},
    "conv-grouped": {"conv": 3, "block": "transformer", "kv_heads": 2, "position": "rotary"},
    "conv-longer-than-calls": {"conv": 7, "position": "none", "per_layer": {"1": {"kind": "none"}}},
    "conv-one-tap": {"conv": 1},
}
EACH = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def model(**changes) -> TransformerVQ:
    """fp64, in evaluation mode; no parameter is left at 0 or 1, where it would hide something."""
    m = TransformerVQ(TransformerVQConfig(**SIZES | changes), seed=3).double().eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in m.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return m


def text(B: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))


def same(got: torch.Tensor, want: torch.Tensor, rtol: float = 1e-10) -> None:
    assert_same({"x": got}, {"x": want}, rtol)


def state_tensors(state) -> dict[str, torch.Tensor]:
    layers = {f"{i}.{n}": x.double() for i, layer in enumerate(state.layers) for n, x in layer._asdict().items()}
    inputs = {f"inputs.{i}": x for i, x in enumerate(state.inputs)}
    return {**layers, **inputs, "position": state.position, "segment": state.segment}


def test_the_design_s_example():
    m = TransformerVQ(TransformerVQConfig(vocab_size=256, layers=4, quantizer={"kind": "vq", "codes": 128}))
    tokens = torch.randint(256, (2, 9))
    out = m(tokens, state=None, labels=tokens, segments=None, mask=None)
    assert out.logits.shape == (2, 9, 256)
    assert out.logits.dtype == torch.float32
    assert torch.isfinite(out.loss)
    assert len(m.layers) == 4
    assert {name.split("/")[0] for name in out.metrics} == {f"layer{i}" for i in range(4)}
    assert not any(value.requires_grad for value in out.metrics.values())


@EACH
@torch.no_grad()
def test_state_carries_everything(changes):
    """Calls of one token, or of uneven length, equal one call."""
    m, tokens = model(**changes), text(2, 24)
    want = m(tokens)
    for lengths in ([1] * 24, [1, 5, 2, 13, 3]):
        state, logits = None, []
        for part in tokens.split(lengths, dim=1):
            out = m(part, state=state)
            state, logits = out.state, [*logits, out.logits]
        same(torch.cat(logits, 1), want.logits)
        assert_same(state_tensors(state), state_tensors(want.state), rtol=1e-10)


@EACH
@torch.no_grad()
def test_document_ignores_what_precedes_it(changes):
    m, tokens = model(**changes), text(2, 30)
    segments = torch.tensor([[5] * 11 + [2] * 13 + [5] * 6, [1] * 30])
    together = m(tokens, segments=segments)
    for first, last in ((0, 11), (11, 24), (24, 30)):
        same(together.logits[:1, first:last], m(tokens[:1, first:last]).logits)
    same(together.logits[1:], m(tokens[1:]).logits)
    state, logits = None, []
    for part, ids in zip(tokens.split(4, 1), segments.split(4, 1), strict=True):  # calls that cut documents
        out = m(part, state=state, segments=ids)
        state, logits = out.state, [*logits, out.logits]
    same(torch.cat(logits, 1), together.logits)


@EACH
def test_padding_is_invisible(changes):
    """Left- and right-padded rows, and holes: logits, losses, metrics, gradients and state of the unpadded text."""
    m, tokens, labels = model(**changes).train(), text(1, 20), text(1, 20, seed=1)
    want = m(tokens, labels=labels)
    want.loss.backward()
    gradients = {
        n: p.grad.clone() for n, p in m.named_parameters() if p.grad.abs().max() > 1e-12
    }  # u is 0 for one code
    for places in (torch.arange(7, 27), torch.arange(20), torch.arange(20) * 27 // 20):
        m.zero_grad()
        m.discard_codebook_statistics()
        mask = torch.zeros(1, 27, dtype=torch.bool)
        mask[0, places] = True
        padded, padded_labels = text(1, 27, seed=2), text(1, 27, seed=3)
        padded[mask], padded_labels[mask] = tokens[0], labels[0]
        got = m(padded, labels=padded_labels, mask=mask)
        got.loss.backward()
        same(got.logits[mask], want.logits[0])
        assert_same(losses(got) | got.metrics, losses(want) | want.metrics, rtol=1e-10)
        assert_same({name: m.get_parameter(name).grad for name in gradients}, gradients, rtol=1e-8)
        if not any(isinstance(layer, FullState) for layer in got.state.layers):  # which keeps padding, dead
            assert_same(state_tensors(got.state), state_tensors(want.state), rtol=1e-10)
        assert (got.labels, got.tokens) == (20, 20)


def losses(out) -> dict[str, torch.Tensor]:
    return {"loss": out.loss.detach(), "lm": out.loss_lm.detach(), "commit": out.loss_commit.detach()}


@EACH
@torch.no_grad()
def test_future_is_invisible(changes):
    m, tokens = model(**changes), text(1, 24)
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % VOCAB
    got, want = m(changed).logits, m(tokens).logits
    same(got[:, :15], want[:, :15])
    assert not torch.allclose(got[:, 15], want[:, 15])


@torch.no_grad()
def test_cache_reaches_beyond_the_window_and_window_only_does_not():
    """One layer and a token far back: seen through its code with the cache, not at all without."""
    tokens = text(1, 24)
    changed = tokens.clone()
    changed[:, 2] = (changed[:, 2] + 1) % VOCAB
    for quantizer in ({"kind": "vq", "codes": 8}, {"kind": "none"}):
        for cache in (True, False):
            m = model(layers=1, cache=cache, quantizer=quantizer)
            moved = (m(changed).logits - m(tokens).logits).abs().amax(-1)[0]
            assert (moved[2:8] > 1e-6).all()
            assert (moved[8:] > 1e-9).all() if cache else (moved[8:] == 0).all()


@EACH
@torch.no_grad()
def test_output_does_not_depend_on_block_length(changes):
    tokens = text(2, 23)
    want = model(**changes)(tokens).logits
    for block_len in (1, 7, 64):
        same(model(**changes | {"block_len": block_len})(tokens).logits, want)


def test_losses_are_what_they_say():
    m, tokens, labels = model(quantizer={"kind": "vq", "codes": 8, "commit": 0.25}).train(), text(2, 9), text(2, 9, 1)
    labels[0, :4] = -100
    out = m(tokens, labels=labels)
    counted = labels != -100
    logprobs = out.logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    same(out.loss_lm, -logprobs[counted].mean())
    same(out.loss, out.loss_lm + 0.25 * out.loss_commit)
    same(out.loss_quantizers, 0.25 * out.loss_commit)
    same(out.loss_commit, sum(m.features(tokens)[2][i].commitment for i in range(2)))
    assert (out.labels, out.tokens) == (14, 18)
    assert m(tokens, labels=torch.full_like(labels, -100)).loss_lm == 0
    unlabelled = m(tokens)
    assert unlabelled.loss is unlabelled.loss_lm is unlabelled.labels is None


@torch.no_grad()
def test_logit_scale_multiplies_the_bias_too():
    tokens = text(2, 9)
    for tied in (True, False):
        one = model(tied_embedding=tied)(tokens).logits
        same(model(tied_embedding=tied, logit_scale=0.25)(tokens).logits, one / 4)


def test_tied_head_shares_the_embedding():
    m, tokens = model(tied_embedding=True), text(2, 9)
    x = m.features(tokens)[0]
    same(m(tokens).logits, x @ m.embedding.weight.T + m.head_bias)
    assert not hasattr(m, "head")


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_computed_in_fp32_whatever_the_model(tied):
    m = model(tied_embedding=tied).bfloat16()
    x = m.features(text(1, 9))[0]
    logits = m.logits(x)
    assert logits.dtype == torch.float32
    wide = m.double().logits(x.double()).float()
    assert torch.allclose(logits, wide, rtol=1e-5, atol=1e-5) == tied


def test_weights_depend_on_the_seed_alone():
    config = TransformerVQConfig(**SIZES)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = TransformerVQ(config, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    two, other = TransformerVQ(config, seed=1).state_dict(), TransformerVQ(config, seed=2).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])
    assert not torch.equal(one["layers.0.q_proj.weight"], one["layers.1.q_proj.weight"])


def test_runs_that_differ_in_the_quantizer_start_from_the_same_weights():
    vq, full = model(), model(quantizer={"kind": "none"})
    for name, parameter in full.named_parameters():
        assert torch.equal(vq.get_parameter(name), parameter)


def test_weights_start_as_in_the_paper():
    m = TransformerVQ(TransformerVQConfig(**SIZES | {"width": 256, "vocab_size": 500, "absolute_positions": True}))
    assert abs(m.embedding.weight.std() - 1) < 0.02
    layer = m.layers[0]
    for linear in (layer.q_proj, layer.kvg_proj, layer.position.r_proj, layer.out_proj, m.head):
        assert abs(linear.weight.std() * linear.in_features**0.5 - 1) < 0.05
    assert m.absolute_scale == 0
    for zero in (layer.position.u, layer.position.v, layer.norm.bias, m.norm.bias, m.head.bias):
        assert not zero.any()
    assert (layer.norm.weight == 1).all()
    assert layer.out_proj.bias is layer.q_proj.bias is None


def test_every_layer_has_the_quantizer_that_the_config_names():
    m = model(layers=4, per_layer={"0-1": {"codes": 5}, "3": {"kind": "none"}})
    assert [layer.quantizer.codebook.shape for layer in m.layers[:3]] == [(4, 5, 4), (4, 5, 4), (4, 8, 4)]
    kinds = [type(state) for state in m(text(1, 3)).state.layers]
    assert kinds == [AttentionState] * 3 + [FullState]
    assert not torch.equal(m.layers[0].quantizer.codebook, m.layers[1].quantizer.codebook)


@EACH
def test_every_parameter_gets_a_gradient(changes):
    m = model(**changes).train()
    m(text(2, 20), labels=text(2, 20, seed=1)).loss.backward()
    assert [name for name, p in m.named_parameters() if p.grad is None or not p.grad.any()] == []


@EACH
@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_trains(changes, autocast):
    m = TransformerVQ(TransformerVQConfig(**SIZES | changes))
    m = m if autocast else m.bfloat16()
    state = None
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = m(text(2, 20), state=state, labels=text(2, 20, seed=1))
        out.loss.backward()
        m.apply_codebook_statistics()
        state = out.state
        assert out.logits.dtype == out.loss.dtype == torch.float32
        assert torch.isfinite(out.loss)
    assert all(torch.isfinite(p.grad).all() for p in m.parameters() if p.grad is not None)


def test_checkpointing_changes_memory_alone():
    """Same loss, gradients and codebook statistics, with every dropout on: masks repeat, statistics do not double."""
    drop = {f"dropout_{name}": 0.3 for name in ("embedding", "sinusoid", "residual", "layer")}
    results = []
    for checkpointing in (False, True):
        m = model(**drop, checkpoint_activations=checkpointing).train()
        torch.manual_seed(0)
        m(text(2, 20), labels=text(2, 20, seed=1)).loss.backward()
        m.apply_codebook_statistics()
        results.append({n: p.grad for n, p in m.named_parameters()} | {n: b for n, b in m.named_buffers()})
    assert_same(results[1], results[0], rtol=1e-12)


def test_dropout_is_off_in_evaluation_and_keeps_the_mean_in_training():
    drop = {"dropout_layer": 0.5, "layers": 1, "final_norm": False}
    m, tokens = model(**drop), text(2, 6)
    same(m(tokens).logits, model(layers=1, final_norm=False)(tokens).logits)
    embedded = m.embedding(tokens)
    update = m.features(tokens)[0] - embedded
    m.train()
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):  # each example by itself skips the block, or gets twice the update
        rows = m.features(tokens)[0] - embedded
        skipped = tuple(not row.any() for row in rows)
        seen.add(skipped)
        for row, whole, skip in zip(rows, update, skipped, strict=True):
            if not skip:
                same(row, 2 * whole)
    assert len(seen) == 4


@torch.no_grad()
@pytest.mark.parametrize("where", ["layer", "sinusoid"])
def test_some_masks_last_a_sequence(where):
    """Pieces with carried state get the masks of the whole; a row that starts anew gets new ones."""
    m, tokens = model(**{f"dropout_{where}": 0.5, "layers": 4}).train(), text(8, 12)
    first = m(tokens[:, :6])
    again = m(tokens, state=first.state.reset_rows(torch.ones(8, dtype=torch.bool))._replace(draws=first.state.draws))
    whole = again.logits[:, 6:]
    second = m(tokens[:, 6:], state=first.state)
    same(second.logits, whole)
    assert torch.equal(second.state.draws, first.state.draws)
    fresh = torch.arange(8) < 4
    third = m(tokens[:, :6], state=second.state.reset_rows(fresh)).state.draws
    assert torch.equal(third == first.state.draws, ~fresh)
    assert (third > 0).all()
    assert not torch.equal(m(tokens[:, :6]).logits, first.logits)


def test_warm_up_is_full_attention_and_ends_at_its_step():
    """Before start_step the layer is a `none` layer; then it quantizes, and starts empty after keys without codes."""
    late = model(quantizer={"kind": "vq", "codes": 8, "start_step": 3})
    full = model(quantizer={"kind": "none"})
    full.load_state_dict(late.state_dict(), strict=False)
    tokens = text(2, 20)
    late.set_step(2)
    assert late.keeps_every_key
    out = late(tokens)
    same(out.logits, full(tokens).logits)
    late.train()
    late.set_step(3)
    late(tokens)  # the codebook is set from these keys
    late.eval()
    assert not late.keeps_every_key
    assert not torch.allclose(late(tokens).logits, out.logits)
    same(late(tokens, state=out.state).logits, late(tokens).logits)
    same(full(tokens, state=late(tokens).state).logits, out.logits)  # nor the other way round


def test_statistics_reach_every_layer():
    m = model().train()
    before = [layer.quantizer.codebook.clone() for layer in m.layers]
    m(text(2, 20))
    m.discard_codebook_statistics()
    m.apply_codebook_statistics()
    assert all(torch.equal(layer.quantizer.codebook, c) for layer, c in zip(m.layers, before, strict=True))
    m(text(2, 20))
    m.apply_codebook_statistics()
    assert not any(torch.equal(layer.quantizer.codebook, c) for layer, c in zip(m.layers, before, strict=True))


@torch.inference_mode()
def test_frozen_changes_time_alone():
    m, tokens = model(), text(2, 6)
    want = m(tokens).logits
    with m.frozen():
        same(m(tokens).logits, want)
    m.train()
    with pytest.raises(RuntimeError, match="eval"), m.frozen():
        pass


def test_no_vocabulary_and_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="vocab_size"):
        TransformerVQ(TransformerVQConfig())
    m = model()
    with pytest.raises(ValueError, match=r"tokens has shape \(3,\)"):
        m(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels has shape \(2, 3\); tokens' \(2, 4\)"):
        m(text(2, 4), labels=text(2, 3))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 5\)"):
        m(text(2, 4), mask=torch.ones(2, 5, dtype=torch.bool))


def test_no_token_and_a_state_of_other_rows_are_refused():
    m, tokens = model(), text(2, 3)
    state = m(tokens).state
    with pytest.raises(ValueError, match="length at least 1"):
        m(tokens[:, :0])
    with pytest.raises(ValueError, match="state has 2 rows; tokens' 1"):
        m(tokens[:1], state=state)
