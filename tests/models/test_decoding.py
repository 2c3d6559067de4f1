"""One token at a time inside `frozen()`: the numbers of the long way, for everything that a model can be made of."""

from __future__ import annotations

import copy
import pickle
import warnings
from unittest import mock

import pytest
import torch
from helpers import assert_same
from interpret import interpret
from torch import Tensor, nn

from transformer_vq import TransformerVQ, TransformerVQConfig
from transformer_vq.models import ModelState, decoding, prepared
from transformer_vq.models.decoding import Decoder, Decoding
from transformer_vq.ops.attention import FullState, step

SIZES = {"vocab_size": 11, "layers": 2, "width": 8, "key_dim": 4, "value_dim": 6, "window": 3, "block_len": 4}
VQ = {"kind": "vq", "codes": 5}
HEADS = {"block": "transformer", "heads": 4, "kv_heads": 2}
MODELS = {
    "xl": {"quantizer": VQ},
    "xl, heads": {"quantizer": VQ, **HEADS},
    "scalar": {"quantizer": VQ, "position": "scalar", **HEADS},
    "rotary": {"quantizer": VQ, "position": "rotary", "heads": 2, "kv_heads": 1},
    "rotary, heads": {"quantizer": VQ, "position": "rotary", "heads": 4, "kv_heads": 2},
    "none": {"quantizer": VQ, "position": "none", "absolute_positions": True, "final_norm": False},
    "adopted": {
        "quantizer": VQ,
        "position": "rotary",
        "window_keys": "exact",
        "qk_norm": False,
        "norm_eps": 0.1,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        **HEADS,
    },
    "exact keys": {"quantizer": VQ, "window_keys": "exact", "norm_eps": 0.1},
    "conv": {"quantizer": VQ, "conv": 3, **HEADS},
    "no cache": {"quantizer": VQ, "cache": False},
    "no window": {"quantizer": VQ, "window": 0, "tied_embedding": True, "logit_scale": 0.5},
    "cosine": {"quantizer": {**VQ, "lookup": "cosine"}, "heads": 2},
    "simvq": {"quantizer": {"kind": "simvq", "codes": 5}},
    "fsq": {"quantizer": {"kind": "fsq", "levels": [4, 3], "expansion": "mlp"}, "heads": 2},
    "bsq": {"quantizer": {"kind": "bsq", "bits": 3}, "heads": 2, "kv_heads": 1},
    "one full layer": {"quantizer": VQ, "per_layer": {"1": {"kind": "none"}}, "conv": 2},
    "one layer warms up": {"quantizer": VQ, "per_layer": {"0": {"start_step": 5}}},
}


def model(name: str) -> TransformerVQ:
    made = TransformerVQ(TransformerVQConfig(**SIZES | MODELS[name]), seed=1).double().eval()
    generator = torch.Generator().manual_seed(2)
    for p in made.parameters():  # biases, u, v and absolute_scale too
        p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return made


def text(B: int, T: int) -> Tensor:
    return torch.randint(11, (B, T), generator=torch.Generator().manual_seed(3))


def numbers(state: ModelState) -> dict[str, Tensor]:
    layers = {f"{i}.{n}": x.double() for i, layer in enumerate(state.layers) for n, x in layer._asdict().items()}
    rest = {"position": state.position, "segment": state.segment, **{f"in{i}": x for i, x in enumerate(state.inputs)}}
    return layers | {name: x.double() for name, x in rest.items()}


def told(out) -> dict[str, Tensor]:
    """All that a call says."""
    losses = {"loss_commit": out.loss_commit, "loss_quantizers": out.loss_quantizers, "tokens": out.tokens.double()}
    return {"logits": out.logits, **losses, **{n: m.double() for n, m in out.metrics.items()}, **numbers(out.state)}


@torch.inference_mode()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("start", ["nothing", "ragged prompts"])
def test_a_token_at_a_time_equals_the_long_way(name, start, monkeypatch):
    monkeypatch.setattr(step, "ROOM", 4)
    m, tokens, state = model(name), text(3, 25), None
    if start != "nothing":
        state = m(tokens[:, :8], mask=torch.arange(8) >= torch.tensor([[0], [7], [3]])).state
    long_way = copy.copy(m)  # the same modules, not frozen
    with m.frozen():
        mine = state
        for t in range(8, 19):
            want = long_way(tokens[:, t : t + 1], state=state)
            with mock.patch.object(m, "features", side_effect=AssertionError("the long way")):
                got = m(tokens[:, t : t + 1], state=mine)
            state, mine = want.state, got.state
            assert isinstance(mine, Decoding) and isinstance(state, ModelState)
            assert_same(told(got), told(want), rtol=1e-12)
        chosen = torch.tensor([2, 0])  # and what reads the state reads it as it is
        more = m(tokens[chosen, :9], state=mine.select_rows(chosen)).logits
        assert_same({"": more}, {"": long_way(tokens[chosen, :9], state=state.select_rows(chosen)).logits}, rtol=1e-12)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in MODELS), ("rotary, heads", torch.float16)], ids=str
)
def test_sixteen_bits_are_rounded_where_the_long_way_rounds_them(name, dtype, monkeypatch):
    """Against fp64 both ways are off by the same, and the state is of the same types, its keys rows of the codebook."""
    monkeypatch.setattr(step, "ROOM", 4)
    m, tokens = model(name).to(dtype), text(3, 24)
    exact = copy.deepcopy(m).double()
    state = m(tokens[:, :8]).state
    long_way, errors, mine = copy.copy(m), {"long": 0.0, "short": 0.0}, state
    with m.frozen():
        for t in range(8, 24):
            token = tokens[:, t : t + 1]
            true = exact(token, state=state).logits
            want, got, same = long_way(token, state=state), m(token, state=mine), m(token, state=state)
            errors["long"] += (want.logits - true).square().sum()
            errors["short"] += (same.logits - true).square().sum()
            assert isinstance(same.state, Decoding) and same.logits.dtype == want.logits.dtype
            for a, b in zip(same.state.layers, want.state.layers, strict=True):
                assert [x.dtype for x in a] == [x.dtype for x in b]
            first, its = want.state.layers[0], same.state.layers[0]
            assert torch.equal(its[0], first[0])  # the first layer's codes, or keys
            state, mine = want.state, got.state
    assert errors["short"] < 1.2 * errors["long"]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_without_a_norm_are_those_of_the_long_way(dtype):
    """At widths whose K^(-1/4) is no number of 16 bits."""
    config = TransformerVQConfig(**{**SIZES, "key_dim": 80, "qk_norm": False, "block": "transformer", "quantizer": VQ})
    layer = TransformerVQ(config).to(dtype).layers[0]
    x = torch.randn(3, 1, 2 * 80, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = layer.key_heads(x, 2)[:, :, 0]
    assert torch.equal(prepared.head_norm(layer, layer.norm.weight)(x.view(3, 2, 80)), want)


@torch.no_grad()
def test_weights_of_several_types_go_the_long_way():
    m, one = model("xl, heads").bfloat16(), text(2, 1)
    for norm in (m.norm, *(layer.norm for layer in m.layers)):
        norm.float()
    want = m(one).logits
    with m.frozen():
        got = m(one)
    assert not isinstance(got.state, Decoding) and torch.equal(got.logits, want)


@torch.no_grad()
def test_states_are_never_changed_and_may_be_gone_on_from_twice():
    m, tokens = model("one full layer"), text(2, 20)
    with m.frozen():
        states, logits = [m(tokens[:, :4]).state], []
        for t in range(4, 20):
            out = m(tokens[:, t : t + 1], state=states[-1])
            states.append(out.state)
            logits.append(out.logits)
        for t in reversed(range(16)):
            m(tokens[:, t : t + 1] * 0, state=states[t])  # another token takes the slot
            again = m(tokens[:, 4 + t : 5 + t], state=states[t])
            assert torch.equal(again.logits, logits[t])
    assert isinstance(states[-1].layers[1], FullState)
    assert_same(numbers(pickle.loads(pickle.dumps(states[9]))), numbers(states[9]), rtol=0.0)
    assert_same(numbers(copy.deepcopy(states[9])), numbers(states[9]), rtol=0.0)


@torch.no_grad()
def test_what_it_cannot_do_goes_the_long_way():
    m, one = model("xl"), text(2, 1)
    plain = m(one).logits
    with m.frozen():
        assert isinstance(m(one).state, Decoding)
        others = [
            m(one, labels=one),
            m(one, segments=one),
            m(one, mask=one >= 0),
            m(text(2, 2)),
        ]
        assert not any(isinstance(out.state, Decoding) for out in others)
        with torch.enable_grad():
            assert m(one).logits.requires_grad
        with torch.autocast("cpu", torch.bfloat16):
            assert not isinstance(m(one).state, Decoding)
    assert not isinstance(m(one).state, Decoding)
    m.layers[0].q_proj.register_forward_hook(lambda *_: None)
    m.layers[1].q_proj = nn.Sequential(m.layers[1].q_proj)
    decoder = Decoder(m.embedding, m.absolute_scale, m.layers, m.norm)
    assert decoder.steps == [None, None] and not decoder.useful
    m.layers[0].q_proj._forward_hooks.clear()
    with m.frozen():
        assert_same({"": m(one).logits}, {"": plain}, rtol=1e-12)


@torch.no_grad()
def test_new_weights_count_from_the_next_frozen_on():
    m, one = model("rotary"), text(2, 1)
    with m.frozen():
        before = m(one).logits
    m.layers[0].out_proj.weight.data.mul_(2)
    m.layers[1].quantizer.ema_sum.mul_(0.5)
    with m.frozen():
        after = m(one).logits
    assert_same({"": after}, {"": m(one).logits}, rtol=1e-12)
    assert not torch.allclose(before, after)


@torch.no_grad()
@pytest.mark.parametrize("name", ["xl, heads", "rotary", "conv"])
def test_a_state_outlives_the_weights_that_it_was_made_with(name):
    m, tokens = model(name), text(2, 6)
    with m.frozen():
        state = m(tokens[:, :4]).state
        state = m(tokens[:, 4:5], state=state).state
    assert isinstance(state, Decoding)
    for layer in m.layers:
        layer.quantizer.ema_sum.mul_(0.5)
        layer.out_proj.weight.mul_(2)
    want = m(tokens[:, 5:], state=state).logits
    with m.frozen():
        assert_same({"": m(tokens[:, 5:], state=state).logits}, {"": want}, rtol=1e-12)


@torch.no_grad()
def test_rows_and_sizes_of_a_state_are_checked():
    m = model("xl")
    state, other = m(text(2, 3)).state, model("no window")(text(1, 3)).state
    with m.frozen():
        with pytest.raises(ValueError, match="state has 2 rows; tokens' 1"):
            m(text(1, 1), state=state)
        with pytest.raises(ValueError, match=r"state\.codes has shape"):
            m(text(1, 1), state=other)
        after = m(text(2, 1), state=state).state
        with pytest.raises(ValueError, match="state has 2 rows; tokens' 1"):
            m(text(1, 1), state=after)


@pytest.mark.timeout(900)
def test_decoding_in_place_under_the_interpreter():
    interpret("models/interpreted_decoding.py", timeout=890)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_decoding_in_place_for_all_models():
    interpret("models/interpreted_decoding.py", "-m", "slow", timeout=3590)


@pytest.mark.parametrize("layer", ["small", "large"])
def test_small_steps_wake_no_other_thread(layer, monkeypatch):
    small = model("xl")
    monkeypatch.setattr(decoding, "WORTH_THREADS", 10**9 if layer == "small" else 0)
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        with torch.no_grad(), small.frozen():
            token = torch.tensor([[1]])
            out = small(token)
            hook = mock.Mock(side_effect=lambda x: seen.append(torch.get_num_threads()) or x)
            assert small._decoder is not None
            monkeypatch.setattr(small._decoder, "norm", hook)
            small(token, state=out.state)
            assert seen == [1 if layer == "small" else 2]
            assert torch.get_num_threads() == 2
            hook.side_effect = KeyError
            with pytest.raises(KeyError):
                small(token, state=out.state)
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["xl, heads", "rotary, heads", "scalar", "exact keys", "fsq", "conv"])
def test_a_captured_step_equals_launch_by_launch_on_a_gpu(name, dtype, monkeypatch):
    made = model(name).cuda().to(dtype)
    tokens, found = text(3, 20).cuda(), {}
    for graphs in (False, True):
        monkeypatch.setattr(decoding, "possible", lambda device, graphs=graphs: graphs)
        state = made(tokens[:, :6]).state
        with made.frozen(in_place=True), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # nothing falls back
            logits = []
            for t in range(6, 20):
                out = made(tokens[:, t : t + 1], state=state)
                state = out.state
                logits.append(out.logits)
            assert (state.graph is not None) == (graphs and name != "conv")
            found[graphs] = {"logits": torch.cat(logits, 1)} | numbers(state)
    assert_same(found[True], found[False], rtol=0.0)
