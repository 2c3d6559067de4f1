"""The cost model against what a call does: FLOPs of products exactly, numbers read and written nearly."""

from __future__ import annotations

import pytest
import torch
from attention_cases import attention_case, call, run
from helpers import assert_same
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transformer_vq.ops.attention import block_length, blockwise
from transformer_vq.ops.attention.arguments import Arguments
from transformer_vq.ops.attention.block_length import CHOICES, cheapest, cost, flops, longest_alone, passes
from transformer_vq.ops.attention.call import prepare

VIEWS = "view slice select unfold transpose as_strided expand unsqueeze alias t unflatten permute detach split unbind "
VIEWS += "_unsafe_view empty new_empty lift_fresh narrow split_with_sizes"


class Counter(TorchDispatchMode):
    flops = numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name in ("bmm", "baddbmm"):
            a, b = args[-2:]
            self.flops += 2 * a.numel() * b.shape[-1]
        elif name not in VIEWS.split():
            made = name.startswith(("new_", "zeros", "ones", "full", "arange"))
            touched = tree_leaves(out if made else (args, kwargs, out))
            self.numbers += sum({(x.data_ptr(), x.numel()): x.numel() for x in touched if torch.is_tensor(x)}.values())
        return out


def counted(T: int, L: int, S: int, M: int, G: int, K: int, V: int, rotary: bool) -> Counter:
    case = attention_case(
        T=T, block_len=L, S=S, window=M, B=1, H=G, Hkv=1, K=K, V=V, rotary=rotary, dtype=torch.float32
    )
    ready = prepare(Arguments(**case.tensors, **case.options, **case.extra))
    with torch.no_grad(), Counter() as counter:
        notes = blockwise.notes(ready)
        o = blockwise.forward(ready, notes)
        blockwise.backward(ready, o, notes, torch.randn_like(o))
    return counter


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(
    ("L", "S", "M", "G", "K", "V"),
    [(16, 64, 32, 1, 16, 24), (128, 64, 32, 2, 16, 48), (32, 512, 32, 1, 32, 24), (64, 128, 128, 4, 48, 48)],
)
def test_costs_are_those_counted(L, S, M, G, K, V, rotary):
    T = max(L, 4096 // G)  # one whole chunk
    got, sizes = counted(T, L, S, M, G, K, V, rotary), (L, S, M, G, K, V, rotary)
    assert got.flops == pytest.approx(T * flops(*sizes), rel=1e-9)
    assert got.numbers == pytest.approx(T * passes(*sizes), rel=0.25)


@pytest.mark.parametrize(("S", "M", "G", "K", "V"), [(512, 32, 1, 24, 24), (64, 32, 1, 24, 24), (16, 128, 4, 24, 24)])
def test_the_choice_has_the_least_counted_cost_or_nearly(S, M, G, K, V):
    found = {L: counted(4096 // G, L, S, M, G, K, V, False) for L in CHOICES}
    costs = {L: c.flops + block_length.NUMBER * c.numbers for L, c in found.items()}
    assert costs[cheapest(S, M, G, K, V, False)] <= 1.1 * min(costs.values())


def test_many_codes_or_wide_values_make_long_blocks_and_few_make_short_ones():
    assert cheapest(512, 32, 1, 64, 64, False) == 128
    assert cheapest(512, 512, 1, 128, 1536, False) == 128
    assert cheapest(4, 8, 4, 16, 16, False) == 16
    assert cheapest(0, 16, 1, 16, 16, False) == 16  # no cache


def test_left_out_it_is_chosen_and_nothing_changes():
    case = attention_case(T=150, S=9, window=5)
    given = {name: x for name, x in case.options.items() if name != "block_len"}
    chosen = prepare(Arguments(**case.tensors, **given))
    assert longest_alone(9, 5, 1, 4, 3, False) < 150
    assert chosen.block_len == cheapest(9, 5, 1, 4, 3, False)
    auto = call(case.with_options(block_len=None), backend="blockwise")[0]
    assert torch.allclose(auto, call(case, backend="blockwise")[0], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="gradients='block' needs block_len"):
        call(case.with_options(block_len=None, gradients="block"))


@pytest.mark.parametrize(("S", "M", "G", "K", "V"), [(64, 16, 1, 64, 128), (512, 512, 1, 128, 1536), (9, 5, 4, 4, 3)])
@pytest.mark.parametrize("two_sided", [False, True])
def test_one_block_pays_up_to_the_length_where_both_cost_the_same(S, M, G, K, V, two_sided):
    sizes, most = (M, G, K, V, two_sided), longest_alone(S, M, G, K, V, two_sided)
    L = cheapest(S, *sizes)
    blocks = cost(L, S, *sizes)
    assert all(cost(T, 0, *sizes) <= blocks for T in range(L, most + 1))
    assert cost(most + 1, 0, *sizes) > blocks
    assert longest_alone(0, *sizes) == 0  # there are no means to be spared


@pytest.mark.parametrize("window", [0, 7, 300])
@pytest.mark.parametrize(
    "settings", [{}, {"exact_window": True}, {"gradients": "block"}, {"grad_through_cache": False}], ids=str
)
def test_a_text_of_fewer_tokens_than_codes_is_one_block_without_means(window, settings):
    """And gives what blocks of 16 give, but under the rule that means blocks; after another piece it is none."""
    T, S = 150, 400
    free = settings.get("gradients") != "block"
    case = attention_case(T=T, S=S, window=window, block_len=T, K=8, V=8, B=1, rotary=True, **settings)
    if free:
        case = case.with_options(block_len=None)
    ready = prepare(Arguments(**case.tensors, **case.options, **case.extra))
    with Counter() as counter:
        notes = blockwise.notes(ready)
        blockwise.forward(ready, notes)
    assert ready.block_len == T
    assert all(kept.numel() == 0 for kept in notes)
    assert counter.flops <= 2 * 2 * (2 * T * (window + T) * (8 + 8))  # 2 heads; none of them with 400 codes
    assert_same(run(case, "blockwise"), run(case, "quadratic"), rtol=1e-10)
    if free:
        assert_same(run(case, "blockwise"), run(case.with_options(block_len=16), "blockwise"), rtol=1e-10)

    _, state = call(case.tokens(0, 9), backend="quadratic")
    rest = case.tokens(9, T)
    later = prepare(Arguments(**rest.tensors, **rest.options, **rest.extra, state=state))
    assert all(kept.numel() for kept in blockwise.notes(later))
    assert_same(run(rest, "blockwise", state), run(rest, "quadratic", state), rtol=1e-10)
