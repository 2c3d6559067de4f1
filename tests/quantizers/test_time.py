"""Codes have their time before a running count condemns them, wherever a code came from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_vq.quantizers import build_quantizer

H, K, S = 2, 6, 8


def keys(step: int, n: int = 40) -> torch.Tensor:
    return torch.randn(1, H, n, K, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def step_of(q, step: int, n: int = 40) -> torch.Tensor:
    """One step; which codes (H, S) had a key."""
    q.set_step(step)
    codes = q(keys(step, n)).codes[0]
    q.apply_codebook_statistics()
    return torch.zeros(H, S, dtype=torch.bool).scatter_(1, codes, True)


@settings(deadline=None, max_examples=15)
@given(
    threshold=st.floats(0.01, 1e4),
    ema=st.sampled_from([0.0, 0.5, 0.8, 0.9, 0.93]),
    init=st.sampled_from(["normal", "kmeans", "data"]),
    codebook=st.sampled_from(["ema", "gradient"]),
    start=st.sampled_from([0, 2]),
)
def test_no_row_that_had_keys_in_each_of_its_first_steps_is_lost(threshold, ema, init, codebook, start):
    config = {"kind": "vq", "codes": S, "init": init, "codebook": codebook, "start_step": start}
    q = build_quantizer({**config, "dead_code_threshold": threshold, "ema": ema}, H, K).double()
    plain = build_quantizer({**config, "ema": ema}, H, K).double()
    alive = torch.ones(H, S, dtype=torch.bool)
    for step in range(start + 9):
        alive &= step_of(q, step) | (step < start)
        step_of(plain, step)
        assert (q.age > 0).all() or step < start  # nobody was replaced, with keys or without
        if codebook == "gradient":
            assert torch.equal(q.codebook, plain.codebook)
    assert alive.any()


def test_the_first_step_of_kmeans_keeps_every_row():
    """vector-quantize-pytorch 66: with a threshold above the fresh count every row was replaced at once."""
    config = {"kind": "vq", "codes": 16, "init": "kmeans"}
    q, plain = (build_quantizer(c, 1, 16) for c in (config | {"dead_code_threshold": 2.0}, config))
    k = torch.randn(1, 1, 200, 16, generator=torch.Generator().manual_seed(0))
    for each in (q, plain):
        each(k)
    assert torch.equal(q.codebook, plain.codebook)
    before = q.codebook.clone()
    q.apply_codebook_statistics()
    assert torch.equal(q.age, torch.ones(1, 16, dtype=torch.int64))
    assert (q.codebook - before).norm() < 0.05 * before.norm()  # means of the same keys; no other rows


def test_a_count_that_stays_at_the_threshold_is_not_dead_and_one_below_is_replaced_and_has_its_time_again():
    q = build_quantizer({"kind": "vq", "codes": 2, "dead_code_threshold": 3.0, "ema": 0.9}, 1, 1)
    q.ema_sum.copy_(torch.tensor([[[3.0], [-3.0]]]))
    k = torch.tensor([1.0, 1.1, 0.9, -1.0, -1.0]).view(1, 1, 5, 1)  # three a step, and two
    for step in range(q.time):
        assert torch.equal(q.age, torch.full((1, 2), step))
        q.set_step(step)
        q(k)
        q.apply_codebook_statistics()
    assert q.age.tolist() == [[10, 0]]
    assert q.ema_count[0, 0].item() == pytest.approx(3.0) and q.ema_count[0, 1] == 3.0
    assert (q.codebook[0, 1] == k.flatten()).any()
    for _ in range(q.time - 1):
        q(k)
        q.apply_codebook_statistics()
    assert q.age[0, 1] == 9  # it outlived nine steps whatever it got; the first code now shares its keys and is judged


def test_a_state_without_ages_loads_and_gives_every_code_its_time():
    config = {"kind": "vq", "codes": S, "dead_code_threshold": 2.0}
    q = build_quantizer(config, H, K)
    q.age.fill_(99)
    state = q.state_dict()
    again = build_quantizer(config, H, K)
    again.load_state_dict(state)
    assert (again.age == 99).all()
    again.load_state_dict({name: tensor for name, tensor in state.items() if name != "age"})
    assert (again.age == 0).all()
    plain = build_quantizer({"kind": "vq", "codes": S}, H, K)
    assert "age" not in plain.state_dict()
    plain.load_state_dict(state)
