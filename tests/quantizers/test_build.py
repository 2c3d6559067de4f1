"""One door to all kinds, and clear words for who comes with the wrong settings."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same

from transformer_vq.config import ConfigError
from transformer_vq.config.quantizer import VQConfig
from transformer_vq.ops.nearest import lookup, nearest_code
from transformer_vq.quantizers import QUANTIZERS, build_quantizer
from transformer_vq.quantizers.vq import VectorQuantizer

H, K = 2, 6


@pytest.mark.parametrize("kind", [k for k in QUANTIZERS if k != "none"])
def test_every_kind_trains_applies_saves_and_loads(kind):
    q = build_quantizer({"kind": kind}, H, K)
    k = torch.randn(2, H, 9, K, requires_grad=True)
    out = q(k)
    (out.quantized.square().sum() + out.loss).backward()
    assert k.grad.any()
    q.apply_codebook_statistics()
    q.discard_codebook_statistics()
    q.set_step(3)
    other = build_quantizer({"kind": kind}, H, K, seed=1)
    other.load_state_dict(q.state_dict())
    assert torch.equal(other.codebook, q.codebook)
    assert all(not value.requires_grad and value.shape == () for value in out.metrics.values())
    assert q.codebook.shape == (H, q.config.size, K)


def test_none_passes_keys():
    q = build_quantizer({"kind": "none"}, H, K)
    k = torch.randn(2, H, 9, K)
    out = q(k)
    assert out.quantized is k
    assert out.codes.shape == (2, H, 0) and q.codebook.shape == (H, 0, K)
    assert out.loss == 0 and out.metrics == {}


def test_settings_object_dict_and_default_kind():
    assert isinstance(build_quantizer(VQConfig(codes=3), H, K), VectorQuantizer)
    assert build_quantizer({"codes": 3}, H, K).codebook.shape == (H, 3, K)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "vq", "codes": 0}, "quantizer.codes = 0: must be at least 1"),
        ({"kind": "vq", "cods": 4}, "quantizer.cods: no such key; did you mean codes"),
        ({"kind": "fsq", "levels": [3, 3], "codes": 8}, "must equal the product"),
        ({"kind": "vq", "estimator": "nsvq", "codebook": "gradient"}, "for images only; its value is off the codebook"),
        ({"kind": "vq", "estimator": "hessian"}, "decoder a second time"),
        ({"kind": "lfq", "estimator": "stee"}, "did you mean 'ste'"),
        ({"kind": "no_module:Q", "codes": 4}, "there is no module 'no_module'"),
        ({"kind": "math:sqrt", "codes": 4}, "must be a subclass of transformer_vq.quantizers.Quantizer"),
    ],
)
def test_wrong_settings_are_one_line(config, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build_quantizer(config, H, K)
    assert "\n" not in str(caught.value)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_quantizer.py").write_text(
        "import torch\n"
        "from transformer_vq.quantizers import Quantized, Quantizer\n"
        "class Grid(Quantizer):\n"
        "    def __init__(self, heads, dim, codes, step):\n"
        "        super().__init__()\n"
        "        self.rows = torch.nn.Parameter(torch.arange(heads * codes * dim).view(heads, codes, dim) * step)\n"
        "    @property\n"
        "    def codebook(self):\n"
        "        return self.rows\n"
        "    def forward(self, k, mask=None):\n"
        "        codes = torch.zeros(k.shape[:3], dtype=torch.int64)\n"
        "        zero = k.sum() * 0\n"
        "        return Quantized(codes, self.rows[:, 0][None, :, None].expand_as(k), zero, zero, {})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_a_class_of_ones_own(own_module):
    q = build_quantizer({"kind": "own_quantizer:Grid", "codes": 4, "options": {"step": 0.5}}, H, K)
    assert q.codebook.shape == (H, 4, K)
    assert not q.warming_up
    assert q(torch.randn(1, H, 3, K)).codes.shape == (1, H, 3)


def test_a_class_of_ones_own_with_wrong_options(own_module):
    with pytest.raises(ConfigError, match="unexpected keyword argument 'stepp'"):
        build_quantizer({"kind": "own_quantizer:Grid", "codes": 4, "options": {"step": 0.5, "stepp": 1}}, H, K)


def test_simvq_moves_every_code_by_any_gradient():
    q = build_quantizer({"kind": "simvq", "codes": 8, "commit": 0.5, "codebook_weight": 2.0}, H, K).double()
    k = torch.randn(1, H, 3, K, dtype=torch.float64, requires_grad=True)
    out = q(k)
    codebook = torch.einsum("hsk,hkl->hsl", q.frozen, q.weight)
    assert torch.equal(out.codes, nearest_code(k, codebook))
    assert_same({"l": out.loss}, {"l": 2.5 * out.commitment}, rtol=1e-12)
    rows = lookup(codebook, out.codes)
    want = torch.autograd.grad(2 * (k.detach() - rows).square().sum((1, 3)).mean(), q.weight)[0]
    (got,) = torch.autograd.grad(out.loss, q.weight)
    assert_same({"w": got}, {"w": want}, rtol=1e-12)
    before = q.codebook.detach().clone()
    with torch.no_grad():
        q.weight -= got
    assert ((q.codebook - before).abs().sum(-1) > 0).all()
    assert "frozen" in q.state_dict() and "frozen" not in dict(q.named_parameters())
