"""Places in documents against a loop over tokens, and rows that restart, repeat or go on."""

import pytest
import torch
from helpers import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_vq import TransformerVQ, TransformerVQConfig
from transformer_vq.models.place import locate

ROW = st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=8)


def by_hand(row, position, segment, with_segments):
    places = []
    for identity, real in row:
        if real and with_segments:
            if position > 0 and identity != segment:
                position = 0
            segment = identity
        places.append(position if real else None)
        position += real
    return places, position, segment


@settings(deadline=None, max_examples=200)
@given(ROW, st.integers(0, 3), st.integers(0, 2), st.booleans())
def test_places_equal_a_loop_over_tokens(row, position, segment, with_segments):
    segments, mask = (torch.tensor([list(column)]) for column in zip(*row, strict=True))
    before = torch.tensor([position]), torch.tensor([segment])
    got, *after = locate(mask.shape, before, segments if with_segments else None, mask)
    want, *carried = by_hand(row, position, segment, with_segments)
    assert [p if w is not None else None for p, w in zip(got[0].tolist(), want, strict=True)] == want
    assert [x.item() for x in after] == carried


def model(**changes):
    config = {"vocab_size": 11, "layers": 2, "width": 8, "key_dim": 4, "value_dim": 4, "window": 3, "block_len": 2}
    config |= {"quantizer": {"kind": "vq", "codes": 4}, "absolute_positions": True}
    return TransformerVQ(TransformerVQConfig(**config | changes), seed=0).double().eval()


PER_LAYER = {"1": {"kind": "none"}}  # both kinds of layer state


@torch.no_grad()
def test_reset_rows_start_anew_and_others_go_on():
    m, tokens = model(per_layer=PER_LAYER), torch.arange(24).view(3, 8) % 11
    state = m(tokens[:, :5]).state.reset_rows(torch.tensor([False, True, False]))
    got = m(tokens[:, 5:], state=state).logits
    whole, alone = m(tokens).logits[:, 5:], m(tokens[1:2, 5:]).logits
    assert torch.allclose(got[[0, 2]], whole[[0, 2]], rtol=0, atol=1e-12)
    assert torch.allclose(got[1], alone[0], rtol=0, atol=1e-12)
    assert not torch.allclose(got[1], whole[1], atol=1e-3)


@torch.no_grad()
def test_keys_that_no_row_sees_any_more_are_dropped():
    m, tokens, state = model(per_layer=PER_LAYER), torch.arange(36).view(3, 12) % 11, None
    for step, (fresh, kept) in enumerate([("000", 3), ("100", 6), ("000", 9), ("011", 9), ("111", 3)]):
        if state is not None:
            state = state.reset_rows(torch.tensor([c == "1" for c in fresh]))
        state = m((tokens[:, :3] + step) % 11, state=state).state
        assert state.layers[1].k.shape[2] == state.layers[1].v.shape[2] == state.layers[1].alive.shape[1] == kept


@torch.no_grad()
def test_rows_can_be_chosen_and_repeated():
    m, tokens = model(per_layer=PER_LAYER), torch.arange(24).view(3, 8) % 11
    rows = torch.tensor([2, 0, 0])
    got = m(tokens[rows, 5:], state=m(tokens[:, :5]).state.select_rows(rows)).logits
    assert torch.allclose(got, m(tokens).logits[rows, 5:], rtol=0, atol=1e-12)


@torch.no_grad()
def test_state_is_constant_in_the_tokens_read_unless_a_layer_keeps_every_key():
    def size(m, T):
        state = m(torch.zeros(1, T, dtype=torch.int64)).state
        return sum(x.numel() for layer in state.layers for x in layer)

    constant, growing = model(), model(per_layer=PER_LAYER)
    assert not constant.keeps_every_key
    assert growing.keeps_every_key
    assert size(constant, 5) == size(constant, 50)
    assert size(growing, 5) < size(growing, 50)
    windowed = model(per_layer=PER_LAYER, cache=False)
    assert not windowed.keeps_every_key
    assert size(windowed, 5) == size(windowed, 50)


@pytest.mark.parametrize("cache", [True, False])
def test_65536_tokens_at_once_equal_64_calls(cache):
    tokens = torch.randint(11, (1, 65_536), generator=torch.Generator().manual_seed(0))
    net, state, pieces = model(cache=cache, window=64, block_len=64), None, []
    with torch.inference_mode():
        whole = net(tokens)
        for part in tokens.chunk(64, dim=1):
            out = net(part, state=state)
            state = out.state
            pieces.append(out.logits)
    assert (torch.cat(pieces, 1) - whole.logits).abs().max() < 1e-10
    for one, other in zip(state.layers, whole.state.layers, strict=True):
        numbers = [{name: x.double() for name, x in layer._asdict().items()} for layer in (one, other)]
        assert_same(*numbers, rtol=1e-10)
