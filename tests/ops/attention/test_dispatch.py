"""One way from a backend's name to the backend."""

import torch
from attention_cases import attention_case, call

from transformer_vq.ops.attention import BACKENDS, resolve_backend


def test_auto_says_what_it_takes_and_why():
    chosen = {T: resolve_backend("auto", "cpu", T) for T in (1, 16, 4096)}
    assert {T: name for T, (name, _) in chosen.items()} == {1: "recurrent", 16: "quadratic", 4096: "blockwise"}
    assert all(reason for _, reason in chosen.values())
    assert resolve_backend("recurrent", torch.device("cpu"), 4096)[0] == "recurrent"


def test_auto_gives_what_the_chosen_one_gives():
    for T in (1, 16, 200):
        case = attention_case(T=T)
        name, _ = resolve_backend("auto", "cpu", T)
        assert torch.equal(call(case)[0], call(case, backend=name)[0])


def test_a_backend_of_ones_own():
    case = attention_case()
    o, _ = call(case, backend="transformer_vq.ops.attention.quadratic:quadratic")
    assert torch.equal(o, call(case, backend="quadratic")[0])


def test_every_backend_takes_an_empty_call():
    for name in BACKENDS:
        assert call(attention_case(T=0), backend=name)[0].shape == (2, 2, 0, 3)
