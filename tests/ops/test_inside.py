"""What opaque ops need inside, against what they allocate; and the layers that call them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from peaks import allocated
from torch import Tensor

from transformer_vq.config import TransformerVQConfig
from transformer_vq.models import TransformerVQ
from transformer_vq.models.attention import Carried, Context, VQAttention
from transformer_vq.models.footprint import training
from transformer_vq.ops import inside, nearest
from transformer_vq.ops.estimators import soft
from transformer_vq.ops.live_bytes import counting


def keys(B: int, H: int, T: int, S: int, K: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.zeros(B, H, T, K, dtype=dtype), torch.zeros(H, S, K)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(
    ("B", "H", "T", "S", "K", "dtype"),
    [
        (1, 1, 300, 64, 16, torch.float32),  # one chunk
        (2, 3, 1500, 65_536, 32, torch.float32),  # 64 keys at once, beside a large codebook
        (40, 2, 256, 2048, 64, torch.bfloat16),  # 8 rows at once
    ],
)
def test_a_lookup_needs_what_is_said(B, H, T, S, K, dtype, metric):
    k, codebook = keys(B, H, T, S, K, dtype)
    found = allocated(lambda: nearest.nearest_code(k, codebook, metric)) - 8 * B * H * T
    with counting():
        said = inside.in_chunks(*keys(B, H, T, S, K, dtype), metric)
    assert said == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("estimator", ["ibq", "gumbel", "reinmax"])
@pytest.mark.parametrize(
    ("B", "H", "T", "S", "K"), [(3, 1, 700, 512, 32), (1, 3, 5000, 1024, 16), (2, 2, 90, 16_384, 8)]
)
def test_a_soft_estimator_needs_what_is_said(B, H, T, S, K, estimator):
    tokens = torch.zeros(B, T, dtype=torch.int64) if estimator == "gumbel" else None

    def arguments() -> tuple[object, ...]:
        k, codebook = keys(B, H, T, S, K)
        codes, names = (torch.zeros(shape, dtype=torch.int64) for shape in ((B, H, T), (B, T)))
        return k, codebook, codes, torch.zeros_like(k), 1.0, estimator == "reinmax", None if tokens is None else names

    values = arguments()
    found = allocated(lambda: soft._soft_gradients(*values)) - 4 * K * H * (B * T + S)
    with counting():
        said = inside.of_softmax(*arguments())
    assert said == pytest.approx(found, rel=0.05)


LAYERS = {
    "gumbel": {"quantizer": {"codes": 512, "estimator": "gumbel", "codebook": "gradient"}},
    "reinmax": {"quantizer": {"codes": 512, "estimator": "reinmax", "codebook": "gradient"}},
    "ibq, two heads": {"heads": 2, "quantizer": {"codes": 256, "estimator": "ibq", "codebook": "gradient"}},
    "large codebook": {"quantizer": {"codes": 16_384, "lookup": "cosine"}},
    "simvq": {"quantizer": {"kind": "simvq", "codes": 4096}},
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_takes_what_is_said(name):
    """Its lookup and estimator are most of it here: positions cost nothing, and the window is small."""
    B, T = 2, 1024
    sizes = {"layers": 1, "width": 32, "key_dim": 64, "value_dim": 32, "window": 8, "position": "rotary"}
    config = TransformerVQConfig(vocab_size=64, **sizes, **LAYERS[name])
    said = training(config, B, T).layers[0]
    layer = TransformerVQ(config).layers[0]
    names = torch.zeros(B, T, dtype=torch.int64)
    context = Context(None, None, names[:, 0], names, names)
    passes(layer, context, True)  # what is made once is not asked for
    for part, backward in ((max(said.forward, said.backward), True), (said.forward, False)):
        layer.zero_grad(set_to_none=True)
        layer.quantizer.discard_codebook_statistics()
        assert part == pytest.approx(allocated(lambda backward=backward: passes(layer, context, backward)), rel=0.1)


def passes(layer: VQAttention, context: Context, backward: bool) -> None:
    x = torch.empty(*context.places.shape, layer.config.width)
    x = x.normal_(generator=torch.Generator().manual_seed(0)).requires_grad_()
    y, _, quantized = layer(x, context, Carried(None, None))
    if backward:
        ends = [end for end in (y, quantized.loss) if end.requires_grad]
        torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


@needs_triton
@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, 1), (torch.bfloat16, 3)])
def test_on_a_gpu_a_lookup_needs_tables_and_no_distances(dtype, copies, monkeypatch):
    """Rows of every head, together, and as the kernel takes them: so many parts, of the type of the keys."""
    B, H, T, S, K = 8, 2, 4096, 1024, 64
    monkeypatch.setattr(inside, "kernels_run", lambda: True)
    with counting():
        said = inside.inside("cuda")[torch.ops.transformer_vq.nearest_code.default](
            *keys(B, H, T, S, K, dtype), "cosine"
        )
    table = H * S * K * 4
    assert 2 * table <= said <= (4 + copies) * table < 4 * nearest.ALIVE
