"""The comparison of estimators with the smoothed gradient, against the model itself run on noisy keys."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from transformer_vq import TransformerVQ, TransformerVQConfig
from transformer_vq.bench.agreement import Products, agreements, groups, pooled
from transformer_vq.bench.doctor import Batch
from transformer_vq.bench.gradient import Plan, compare
from transformer_vq.bench.gradient_figure import draw
from transformer_vq.bench.recode import Keys, by_definition, choose, losses, losses_by_code
from transformer_vq.config import ConfigError
from transformer_vq.ops.smoothing import score_gradient
from transformer_vq.quantizers.probe import KeyProbe
from transformer_vq.quantizers.seeds import seeded

BASE = {"vocab_size": 32, "layers": 2, "width": 32, "key_dim": 8, "value_dim": 16, "window": 4, "block_len": 4}
ROWS = 8


def build(**changes):
    changes.setdefault("quantizer", {"kind": "vq", "codes": 6, "init": "data"})
    model = TransformerVQ(TransformerVQConfig(**{**BASE, **changes}), seed=1)
    with torch.no_grad():  # as if trained: what is untrained says next to nothing
        if model.absolute_scale is not None:
            model.absolute_scale.fill_(0.7)
        for layer in model.layers:
            layer.out_proj.weight.mul_(4.0)
    model.train()
    model(batch().tokens)
    model.apply_codebook_statistics()
    return model.double().eval()


def batch(rows=ROWS, length=24):
    tokens = torch.randint(32, (rows, length + 1), generator=torch.Generator().manual_seed(3))
    return Batch(tokens[:, :-1], tokens[:, 1:])


def moved(quantizer, keys, by):
    """Forward passes in which each row's key is moved by `by` (B, K), in front of the quantizer."""

    def change(module, inputs):
        k = inputs[0].clone()
        k[torch.arange(len(by)), keys.heads, keys.places] += by
        return (k, *inputs[1:])

    return quantizer.register_forward_pre_hook(change)


CHANGES = [
    {"backend": "blockwise"},
    {"heads": 2, "kv_heads": 2},
    {"block": "transformer"},
    {"conv": 3},
    {"absolute_positions": True},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("layer", [0, 1])
def test_the_loss_of_a_code_is_the_models_on_a_key_with_that_code(changes, layer):
    model, rows = build(**changes) if changes != {"block": "transformer"} else _transformer(), batch()
    keys, quantizer = choose(model, rows, 0), model.quantizers[layer]
    table = losses_by_code(model, layer, rows, keys, torch.ones(ROWS, 6, dtype=torch.bool))
    noise = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0)).double()
    seen = {}
    look = quantizer.register_forward_hook(lambda module, inputs, result: seen.update(codes=result.codes))
    hook = moved(quantizer, keys, 2 * noise)
    with torch.no_grad():
        want = losses(model, rows, torch.arange(ROWS))
    look.remove(), hook.remove()
    codes = seen["codes"][torch.arange(ROWS), keys.heads, keys.places]
    torch.testing.assert_close(table[torch.arange(ROWS), codes], want)
    assert table.std(1).min() > 1e-6  # the key matters


def _transformer():
    model = TransformerVQ(
        TransformerVQConfig(**{**BASE, "block": "transformer"}, quantizer={"kind": "vq", "codes": 6, "init": "data"})
    ).train()
    model(batch().tokens)
    return model.double().eval()


def test_the_truth_is_the_score_function_of_the_models_own_losses():
    """Every draw run through the model, a forward pass each: the same sums as by codes."""
    model, rows, plan = build(), batch(), Plan(("ste",), (0.7,), ROWS, 64)
    (_, found) = compare(model, rows, plan)
    keys, quantizer = choose(model, rows, plan.seed), model.quantizers[1]
    noise = torch.stack([torch.randn(64, 8, generator=seeded(0, 1, f"noise on key {row}")) for row in range(ROWS)])
    noise, changes = noise.double(), []
    with torch.no_grad():
        for n in range(64):
            pair = []
            for sign in (1, -1):
                hook = moved(quantizer, keys, sign * 0.7 * found.unit * noise[:, n])
                pair.append(losses(model, rows, torch.arange(ROWS)))
                hook.remove()
            changes.append(pair[0] - pair[1])
    change = torch.stack(changes, 1)
    halves = [
        torch.stack([score_gradient(change[b, part], noise[b, part], 0.7 * found.unit) for b in range(ROWS)])
        for part in (slice(32), slice(32, 64))
    ]
    total = (halves[0] * halves[1]).sum()
    mean = sum(halves) / 2
    (truth,) = found.truths
    assert truth.resolved == pytest.approx(float(total / mean.square().sum()), rel=1e-6)
    if total > 0:
        assert truth.length == pytest.approx(float(total) ** 0.5, rel=1e-6)


def test_through_the_window_it_is_what_backpropagation_sees():
    """Of one key of the last layer, its code fixed, the loss is smooth, and has the gradient that arrives at k̂."""
    model, rows = build(), batch()
    layer, quantizer, keys = model.layers[1], model.quantizers[1], choose(model, rows, 0)
    by = 1e-5 * torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0)).double()
    at, every = (torch.arange(ROWS), keys.heads, keys.places), torch.arange(ROWS)

    def moved_row(sign):
        def change(module, inputs, result):
            quantized = result.quantized.clone()
            quantized[at] += sign * by
            return result._replace(quantized=quantized)

        hook = quantizer.register_forward_hook(change)
        with torch.no_grad(), by_definition(layer):
            nats = losses(model, rows, every)
        hook.remove()
        return nats

    with KeyProbe({1: quantizer}) as probe:
        (arrived,) = torch.autograd.grad(losses(model, rows, every).sum(), probe.results[1].quantized)
    want = (arrived[at] * by).sum(-1)
    torch.testing.assert_close((moved_row(1) - moved_row(-1)) / 2, want, rtol=1e-4, atol=1e-11)
    table = losses_by_code(model, 1, rows, keys, torch.ones(ROWS, 6, dtype=torch.bool), "window")
    whole = losses_by_code(model, 1, rows, keys, torch.ones(ROWS, 6, dtype=torch.bool))
    near = keys.places >= rows.tokens.shape[1] - 1 - BASE["window"]  # no query is farther away than the window
    torch.testing.assert_close(table[near], whole[near])
    assert near.any() and ((table - whole)[~near].abs().amax(-1) > 1e-6).all() and layer.config.backend == "auto"


def test_without_quantization_the_estimate_tends_to_the_exact_gradient():
    """`kind: none`: the loss is smooth, its own gradient is known, and more draws come nearer to it."""
    model, rows = build(quantizer={"kind": "none"}), batch(rows=1, length=8)
    layer, attend, shift = model.layers[0], model.layers[0].attend, torch.zeros(1, 8).double()
    place = 2

    def nats(by):  # (N, 8) -> (N)
        def moved_attend(q, k, v, context, state):
            k = k.clone()
            k[:, 0, place] = k[:, 0, place] + by
            return attend(q, k, v, context, state)

        layer.attend = moved_attend
        many = Batch(rows.tokens.expand(len(by), -1), rows.labels.expand(len(by), -1))
        return losses(model, many, torch.arange(len(by)))

    exact = torch.autograd.grad(nats(shift.requires_grad_()).sum(), shift)[0][0]
    cosines = []
    with torch.no_grad():
        for n in (16, 256, 4096):
            noise = torch.randn(n, 8, generator=torch.Generator().manual_seed(5)).double()
            sigma = 0.02
            change = nats(sigma * noise) - nats(-sigma * noise)
            found = score_gradient(change, noise, sigma)
            cosines.append(float(torch.cosine_similarity(found, exact, dim=0)))
    assert cosines[0] < cosines[1] < cosines[2] and cosines[2] > 0.995
    assert found.norm() / exact.norm() == pytest.approx(1, abs=0.05)


class TestAgreement:
    def example(self, n=200, noise=1.0, angle=0.5, scale=2.0):
        """g = scale × the true h turned by an angle; two noisy looks at h."""
        draw = np.random.default_rng(0)
        h = draw.normal(size=(n, 2)) * draw.exponential(size=(n, 1))
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        g, h1, h2 = scale * h @ turn, *(h + noise * draw.normal(size=h.shape) for _ in range(2))
        gs = np.stack([g, h])
        return Products((gs**2).sum(-1), (gs * (h1 + h2) / 2).sum(-1), (h1 * h2).sum(-1))

    def test_noise_of_the_draws_takes_nothing_from_the_cosine(self):
        turned, same = [a for a in agreements(["a", "b"], [1.0], [self.example(4000)], {}) if a.group == "all"]
        assert turned.cosine.value == pytest.approx(math.cos(0.5), abs=0.04)
        assert turned.length.value == pytest.approx(2.0, abs=0.15)
        assert same.cosine.value == pytest.approx(1.0, abs=0.04) and same.length.value == pytest.approx(1.0, abs=0.07)
        assert same.nearer.low > 0 and turned.nearer.value == 0

    def test_intervals_cover_what_is_true(self):
        found = agreements(["a", "b"], [1.0], [self.example()], {})[0]
        assert found.cosine.low < math.cos(0.5) < found.cosine.high and found.cosine.high - found.cosine.low < 0.3
        assert found.length.low < 2.0 < found.length.high

    @pytest.mark.slow
    @pytest.mark.parametrize("keys", [21, 64])
    @pytest.mark.parametrize(("tail", "least"), [(0.0, 0.92), (1.4, 0.87)])
    def test_intervals_cover_in_simulation(self, keys, tail, least):
        """Keys whose gradients are all about as long, or of which a few are most of the sum; angles differ by key."""
        draw = np.random.default_rng(0)

        def products(n):
            size, angle = draw.lognormal(0, tail, (n, 1)), draw.normal(1.0, 0.3, (n, 1))
            h, other, *noise = (draw.normal(size=(n, 32)) * size for _ in range(4))
            g = 2 * (np.cos(angle) * h + np.sin(angle) * other)
            h1, h2 = (h + e for e in noise)
            return Products((g**2).sum(-1)[None], (g * (h1 + h2) / 2).sum(-1)[None], (h1 * h2).sum(-1))

        (cosine,), (length,) = pooled(products(400_000), np.ones((1, 400_000)))
        found = [agreements(["a"], [1.0], [products(keys)], {}, seed)[0] for seed in range(500)]
        assert np.mean([a.cosine.low <= cosine[0] <= a.cosine.high for a in found]) > least
        assert np.mean([a.length.low <= length[0] <= a.length.high for a in found]) > least

    def test_a_truth_that_is_all_noise_gives_no_number(self):
        products = Products(np.ones((1, 9)), np.ones((1, 9)), np.array([-1.0] * 5 + [0.5] * 4))
        (found,) = agreements(["a"], [1.0], [products], {})
        assert math.isnan(found.cosine.value) and not found.cosine.resolved

    def test_two_keys_have_no_interval(self):
        found = agreements(["a"], [1.0], [Products(np.ones((1, 9)), np.ones((1, 9)), np.ones(9))], {"angle": range(9)})
        assert [a.cosine.resolved for a in found] == [True, False, False, False]

    def test_thirds_share_out_the_keys_by_rank(self):
        found = groups(7, {"ratio": [3.0, 1.0, 2.0, 9.0, 8.0, 7.0, 0.0]})
        assert [sorted(found[f"ratio {third}"].tolist()) for third in ("lowest", "middle", "highest")] == [
            [1, 2, 6],
            [0, 5],
            [3, 4],
        ]

    def test_weights_count_keys(self):
        products = self.example(5)
        twice = Products(*(np.concatenate([x, x[..., :1]], -1) for x in products))
        got = pooled(products, np.array([[2.0, 1, 1, 1, 1]]))
        want = pooled(twice, np.ones((1, 6)))
        np.testing.assert_allclose(got, want)


def test_every_estimator_is_compared_in_every_layer_and_the_model_is_left_as_it_was():
    from transformer_vq.ops import estimators

    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = compare(model, batch(), Plan(tuple(estimators.names()), (0.5, 1.0), ROWS, 64))
    assert [layer.layer for layer in found] == [0, 1]
    for layer in found:
        assert len(layer.agreements) == len(estimators.names()) * 2 * 7
        assert len(layer.angle) == len(layer.ratio) == ROWS and layer.estimator == "ste"
        assert 0 < layer.truths[0].moved < layer.truths[1].moved < 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.quantizers[0].pending()[1].any()
    assert draw(found).axes
    assert compare(model, batch(), Plan(("ste",), (0.5, 1.0), ROWS, 64))[0].truths == found[0].truths


def test_lengths_know_the_matrix_of_the_estimator():
    """‖scale‖ / ‖ste‖ is ‖q‖/‖k‖ for every key, and the angle of the two is the same."""
    (layer, _) = compare(build(), batch(), Plan(("ste", "scale", "rotation_unscaled"), (1.0,), ROWS, 4096))
    ste, scale, turned = (a for a in layer.agreements if a.group == "all")
    assert turned.length.value == pytest.approx(ste.length.value)
    assert min(layer.ratio) < scale.length.value / ste.length.value < max(layer.ratio)


@pytest.mark.parametrize(
    ("changes", "plan", "message"),
    [
        ({"quantizer": {"kind": "none"}}, {}, "no layer has a vq or simvq quantizer that has started; they are: none"),
        ({"window_keys": "exact"}, {}, "window_keys = exact"),
        ({}, {"estimators": ("stee",)}, "stee"),
        ({}, {"estimators": ("nsvq",)}, "for images only"),
        ({}, {"draws": 10}, "draws = 10: must be an even number, at least 64"),
        ({}, {"draws": 65}, "draws = 65"),
        ({}, {"keys": 2}, "keys = 2: too few"),
        ({}, {"sigmas": (0.0,)}, "sigma = 0.0"),
        ({}, {"temperature": -1.0}, "temperature = -1.0"),
        ({}, {"through": "cache"}, "through = cache: must be everything or window"),
    ],
)
def test_what_cannot_be_measured_is_one_line(changes, plan, message):
    with pytest.raises(ConfigError, match=message):
        compare(build(**changes), batch(), Plan(**{"estimators": ("ste",), "keys": ROWS, "draws": 64, **plan}))


def test_keys_are_of_every_head():
    keys = choose(build(heads=2, kv_heads=2), batch(64), 0)
    assert isinstance(keys, Keys) and set(keys.heads.tolist()) == {0, 1} and len(set(keys.places.tolist())) > 8


def test_numbers_become_json():
    from dataclasses import asdict

    (layer, _) = compare(build(), batch(), Plan(("ste",), (1.0,), ROWS, 64))
    assert json.loads(json.dumps(asdict(layer)))["agreements"][0]["group"] == "all"
