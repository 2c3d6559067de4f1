"""A healthy model has no red line; every planted fault turns its own line red."""

import json
import sys
import types

import pytest
import torch

from transformer_vq import TransformerVQ, TransformerVQConfig
from transformer_vq.bench.doctor import Batch, diagnose
from transformer_vq.config import ConfigError
from transformer_vq.ops import estimators
from transformer_vq.quantizers import fsq, nearest, vq
from transformer_vq.quantizers.base import Quantized, Quantizer

BASE = {"vocab_size": 32, "layers": 1, "width": 32, "key_dim": 16, "value_dim": 32, "window": 8, "block_len": 8}


def build(**quantizer):
    return TransformerVQ(TransformerVQConfig(**BASE, quantizer={"kind": "vq", "codes": 16, **quantizer}))


def batches(n=2):
    rows = torch.randint(32, (n, 4, 65), generator=torch.Generator().manual_seed(0))
    return [Batch(row[:, :-1], row[:, 1:]) for row in rows]


def checks(model):
    (report,) = diagnose(model, batches())
    return {check.name: check for check in report.checks}


@pytest.mark.parametrize(
    "quantizer",
    [
        {"kind": "vq", "codes": 16},
        {"kind": "vq", "codes": 16, "init": "kmeans", "estimator": "rotation"},
        {"kind": "vq", "codes": 16, "codebook": "gradient", "estimator": "rotation_centred"},
        {"kind": "vq", "codes": 16, "lookup": "cosine", "estimator": "scale"},
        {"kind": "simvq", "codes": 16},
        {"kind": "fsq", "levels": [4, 4]},
        {"kind": "lfq", "bits": 4},
        {"kind": "bsq", "bits": 4},
    ],
    ids=str,
)
def test_a_healthy_model_has_no_red_line(quantizer):
    model = TransformerVQ(TransformerVQConfig(**BASE, quantizer=quantizer))
    (report,) = diagnose(model, batches())
    assert not [check for check in report.checks if check.status == "red"]
    assert {"forward", "moves", "bf16_codes"} <= {check.name for check in report.checks if check.status == "green"}


@pytest.mark.parametrize("name", estimators.names())
def test_the_gradient_of_every_estimator_is_checked(name):
    found = checks(build(estimator=name, codebook="gradient", temperature=0.7, alpha=0.5, init="kmeans"))["gradient"]
    assert found.status == "green", found


@pytest.mark.parametrize("kind", ["fsq", "ifsq", "lfq", "bsq"])
@pytest.mark.parametrize("expansion", ["linear", "mlp"])
def test_the_gradient_through_projection_and_expansion_is_checked(kind, expansion):
    settings = {"levels": [5, 4]} if "fsq" in kind else {"bits": 4, "estimator": "rotation"}
    model = TransformerVQ(TransformerVQConfig(**BASE, quantizer={"kind": kind, "expansion": expansion, **settings}))
    assert checks(model)["gradient"].status == "green"


def test_a_quantizer_that_has_not_started_is_examined_as_it_will_start():
    found = checks(build(start_step=100))
    assert (found["forward"].status, found["moves"].status) == ("green", "green")


def test_a_start_that_needs_more_keys_is_the_users_to_mend():
    with pytest.raises(ConfigError, match=r"fewer than codes = 600"):
        checks(build(codes=600, init="kmeans"))


class Plain(Quantizer):
    """Somebody's own: a fixed codebook, no metrics, straight-through by hand."""

    def __init__(self, heads, dim, codes):
        super().__init__()
        self.register_buffer("rows", torch.randn(heads, codes, dim, generator=torch.Generator().manual_seed(0)))

    @property
    def codebook(self):
        return self.rows

    def forward(self, k, mask=None):
        codes = nearest.nearest_code(k, self.rows)
        q = torch.stack([c[z] for c, z in zip(self.rows, codes.transpose(0, 1), strict=True)], 1)
        zero = k.new_zeros(())
        return Quantized(codes, estimators.apply("ste", k, q), zero, zero, {})


def test_a_quantizer_of_ones_own_is_examined(monkeypatch):
    module = types.ModuleType("somebodys")
    module.Plain = Plain
    monkeypatch.setitem(sys.modules, "somebodys", module)
    found = checks(TransformerVQ(TransformerVQConfig(**BASE, quantizer={"kind": "somebodys:Plain", "codes": 16})))
    assert found["forward"].status == "green" and found["moves"].status == "red"
    assert found["gradient"].status == "none"


def test_the_model_is_left_as_it_was():
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    diagnose(model, batches())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.layers[0].quantizer.pending()[1].any()


def test_layers_without_a_quantizer_have_nothing_to_check():
    model = TransformerVQ(TransformerVQConfig(**BASE, quantizer={"kind": "none"}))
    (report,) = diagnose(model, batches())
    assert (report.checks, report.status) == ([], "none")


def test_reports_become_json():
    (report,) = diagnose(build(), batches())
    assert json.loads(json.dumps(report.as_dict()))["checks"]["forward"]["status"] == "green"


class TestPlantedFaults:
    def test_a_forward_value_that_is_no_code(self, monkeypatch):
        rotated = lambda name, k, q, *rest, **more: (q - k).detach() + k
        monkeypatch.setattr(nearest.estimators, "apply", rotated)
        assert checks(build())["forward"].status == "red"

    def test_a_gradient_that_is_not_the_estimators(self, monkeypatch):
        monkeypatch.setitem(estimators.ESTIMATORS, "rotation", estimators.ESTIMATORS["ste"])
        assert checks(build(estimator="rotation"))["gradient"].status == "red"

    @pytest.mark.parametrize("name", ["gumbel", "random_rotation", "reinmax"])
    def test_a_gradient_that_is_of_no_such_shape(self, monkeypatch, name):
        monkeypatch.setitem(estimators.ESTIMATORS, name, estimators.ESTIMATORS["rotation_tangent"])
        assert checks(build(estimator=name, codebook="gradient", init="kmeans"))["gradient"].status == "red"

    def test_a_rounding_that_stops_the_gradient_in_part(self, monkeypatch):
        bound = fsq.fsq.bound
        monkeypatch.setattr("transformer_vq.quantizers.fsq.fsq.bound", lambda z, *rest: half(bound(z, *rest)))
        half = lambda x: x.detach() + 0.5 * (x - x.detach())
        model = TransformerVQ(TransformerVQConfig(**BASE, quantizer={"kind": "fsq", "levels": [4, 4]}))
        monkeypatch.setattr(
            "transformer_vq.bench.expected.fsq", types.SimpleNamespace(**{**vars(fsq.fsq), "bound": bound})
        )
        assert checks(model)["gradient"].status == "red"

    def test_a_gradient_that_never_arrives(self, monkeypatch):
        monkeypatch.setitem(estimators.ESTIMATORS, "ste", lambda k, q: q.detach())
        assert checks(build(commit=0.0))["gradient"].status == "red"

    def test_a_codebook_that_does_not_move(self, monkeypatch):
        monkeypatch.setattr(vq.VectorQuantizer, "apply_codebook_statistics", lambda self: None)
        assert checks(build())["moves"].status == "red"

    def test_a_gradient_codebook_that_gets_no_gradient(self):
        assert checks(build(codebook="gradient", codebook_weight=0.0))["moves"].status == "red"

    def test_codes_that_no_key_takes(self):
        model = build()
        model.layers[0].quantizer.ema_sum[:, 1:] += 1e3
        assert checks(model)["usage"].status == "red"

    def test_codes_whose_running_count_is_gone(self):
        model = build()
        q = model.layers[0].quantizer
        q.ema_count.mul_(0.02)
        q.ema_sum.mul_(0.02)
        assert checks(model)["dead_codes"].status == "red"

    def test_codes_much_shorter_than_keys(self):
        model = build(estimator="rotation")
        model.layers[0].quantizer.ema_sum.mul_(0.01)
        found = checks(model)["norm_ratio"]
        assert found.status == "red"
        assert "rotation multiplies the task gradient" in found.advice

    def test_codes_that_point_away(self, monkeypatch):
        farthest = nearest.nearest_code
        monkeypatch.setattr(nearest, "nearest_code", lambda k, codebook, metric: farthest(-k, codebook, metric))
        assert checks(build())["cosine"].status == "red"

    def test_keys_on_a_line(self):
        model = build()
        layer = model.layers[0]
        with torch.no_grad():
            layer.kvg_proj.weight[: BASE["key_dim"]] = layer.kvg_proj.weight[:1]
        assert checks(model)["key_rank"].status == "red"

    def test_codes_on_a_line(self):
        model = build()
        q = model.layers[0].quantizer
        q.ema_sum.copy_(q.ema_sum[:, :1] * torch.linspace(0.5, 2, 16)[:, None])
        assert checks(model)["code_rank"].status == "red"

    def test_a_commitment_that_drowns_the_task(self):
        assert checks(build(commit=1e4))["task_share"].status == "red"

    def test_distances_in_bf16(self, monkeypatch):
        def careless(k, codebook, metric):
            k, c = k.bfloat16(), codebook.bfloat16()
            return (c.square().sum(-1)[:, None] - 2 * k @ c.mT).argmin(-1)

        monkeypatch.setattr(nearest, "nearest_code", careless)
        model = build()
        q = model.layers[0].quantizer
        q.ema_sum.copy_(q.ema_sum[:, :1] + 0.01 * q.ema_sum)  # codes so close that bf16 cannot tell them apart
        assert checks(model)["bf16_codes"].status == "red"
