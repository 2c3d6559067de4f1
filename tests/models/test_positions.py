"""Position modules against the formulas, entry by entry."""

import copy
import math
import pickle

import pytest
import torch
from helpers import assert_same
from torch._subclasses.fake_tensor import FakeTensorMode

from transformer_vq import TransformerVQConfig
from transformer_vq.models.dropout import lasting_uniform
from transformer_vq.models.positions import POSITIONS, frequencies, sinusoid
from transformer_vq.ops import constants

K, H, M, D = 4, 2, 3, 6
CONFIG = {"vocab_size": 5, "width": D, "heads": H, "key_dim": K, "window": M, "position_base": 100.0}


def position(kind, **changes):
    config = TransformerVQConfig(**CONFIG, position=kind, **changes)
    module = POSITIONS[kind](config, 0, torch.Generator().manual_seed(0)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def queries(dtype=torch.float64):
    return torch.randn(2, H, 5, K, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("p", [0, 1, 7, 1_000_003])
def test_sinusoid_has_all_sines_then_all_cosines(p):
    row = sinusoid(torch.tensor(p), D, 100.0, torch.float64)
    angles = [p * 100.0 ** (-2 * m / D) for m in range(D // 2)]
    want = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)
    assert (row - want).abs().max() < 1e-9


def test_far_positions_keep_fp32_precision():
    far = torch.tensor(1_000_003)
    assert (sinusoid(far, D, 100.0, torch.float32) - sinusoid(far, D, 100.0, torch.float64)).abs().max() < 1e-6


def test_xl_bias_is_the_formula():
    """(q_i + v/τ)·r_δ with r_δ = (sinusoid(δ) W_r)/τ, head by head; and content queries q_i + u/τ."""
    module, q, tau = position("xl"), queries(), K**0.25
    content, bias, rotary = module(q)
    assert rotary is None
    kernel = module.r_proj.weight.T.view(D, H, K)  # (D, H, K), columns head-major
    for h in range(H):
        u, v = (b.view(H, K)[h] / tau for b in (module.u, module.v))
        assert_same({"q": content[:, h]}, {"q": q[:, h] + u}, rtol=1e-12)
        for distance in range(M + 1):
            r = sinusoid(torch.tensor(distance), D, 100.0, torch.float64) @ kernel[:, h] / tau
            assert_same({"bias": bias[:, h, :, distance]}, {"bias": (q[:, h] + v) @ r}, rtol=1e-12)


def test_frozen_rows_are_the_rows():
    module, q = position("xl"), queries()
    with torch.no_grad():
        free = module(q).bias
        module.freeze(True)
        assert torch.equal(module(q).bias, free)
        module.r_proj.weight.mul_(2)
        assert torch.equal(module(q).bias, free)  # kept, whatever happens to the weight
    assert not torch.equal(module(q).bias, free)  # not where a gradient must reach the weight
    with torch.no_grad():
        module.freeze(False)
        assert not torch.equal(module(q).bias, free)


def test_sinusoid_dropout_hits_the_table_before_its_projection():
    module = position("xl", dropout_sinusoid=0.5)
    table, draws = sinusoid(torch.arange(M + 1), D, 100.0, torch.float64), torch.tensor([5 << 21, 7])
    keep = lasting_uniform(torch.tensor(5), 0, torch.arange(table.numel())).view_as(table) >= 0.5
    want = module.r_proj(table * keep * 2).view(M + 1, H, K).transpose(0, 1) / K**0.25
    assert torch.equal(module.rows(draws), want)
    assert not torch.equal(module.rows(draws.flip(0)), want)
    module.eval()
    assert torch.equal(module.rows(), position("xl").rows())


def test_scalar_bias_is_one_number_a_head_and_distance():
    module, q = position("scalar"), queries()
    content, bias, _ = module(q)
    assert content is q
    assert bias.shape == (1, H, 1, M + 1)
    assert torch.equal(bias[0, 1, 0], module.bias[M + 1 :])


def test_rotary_gives_frequencies_that_survive_bf16():
    content, bias, rotary = position("rotary")(queries(torch.bfloat16))
    assert bias is None
    assert content.dtype == torch.bfloat16
    assert rotary.dtype == torch.float32
    assert torch.equal(rotary, frequencies(K, 100.0, torch.device("cpu")).float())
    assert torch.allclose(rotary, torch.tensor([1.0, 0.1]))


GIVEN = [0.123456789012345, 1e-9]


def test_given_frequencies_are_made_once_and_rounded_once():
    constants._made_once.cache_clear()
    module = position("rotary", rotary_frequencies=GIVEN).bfloat16()
    want = torch.tensor(GIVEN, dtype=torch.float64)
    first = module(queries(torch.bfloat16)).rotary
    assert torch.equal(first, want.float()) and torch.equal(module(queries()).rotary, want)
    others = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), position("rotary", rotary_frequencies=GIVEN))
    assert all(other(queries(torch.float32)).rotary is first for other in others)
    assert not module.state_dict()


def test_given_frequencies_survive_a_model_without_numbers():
    config = TransformerVQConfig(**CONFIG, position="rotary", rotary_frequencies=GIVEN)
    with torch.device("meta"):
        module = POSITIONS["rotary"](config, 0, None)
    found = module.to_empty(device="cpu")(queries(torch.float32)).rotary
    assert torch.equal(found, torch.tensor(GIVEN))


@pytest.mark.parametrize("first", ["inference", "fake"])
def test_given_frequencies_do_not_depend_on_who_asked_first(first):
    constants._made_once.cache_clear()
    module, q = position("rotary", rotary_frequencies=GIVEN), queries()
    with torch.inference_mode() if first == "inference" else FakeTensorMode(allow_non_fake_inputs=True):
        module(q)
    rotary = module(q).rotary
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    (x * rotary).sum().backward()  # keeps them for the backward pass
    assert torch.equal(x.grad, torch.tensor(GIVEN, dtype=torch.float64))


def test_given_frequencies_are_a_part_of_the_graph():
    constants._made_once.cache_clear()
    module, q = position("rotary", rotary_frequencies=GIVEN), queries()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q).rotary, torch.tensor(GIVEN, dtype=torch.float64))
    assert constants._made_once.cache_info().currsize == 0
    assert torch.equal(compiled(q).rotary, module(q).rotary)


def test_none_changes_nothing():
    q = queries()
    assert position("none")(q) == (q, None, None)


@pytest.mark.parametrize("kind", list(POSITIONS))
def test_bf16_queries_stay_bf16(kind):
    assert position(kind).bfloat16()(queries(torch.bfloat16)).q.dtype == torch.bfloat16


def test_biases_have_one_axis_so_that_decay_leaves_them_alone():
    xl, scalar = position("xl"), position("scalar")
    assert [xl.u.ndim, xl.v.ndim, scalar.bias.ndim] == [1, 1, 1]
