"""Both blocks, with unquantized keys and no positions, against their equations written out token by token."""

import pytest
import torch
from helpers import assert_same
from torch.nn.functional import silu

from transformer_vq import TransformerVQ, TransformerVQConfig
from transformer_vq.models.attention import Carried, Context

D, H, HKV, K, V, T = 12, 4, 2, 4, 6, 7


def block_and_input(kind):
    config = TransformerVQConfig(
        vocab_size=5,
        block=kind,
        layers=1,
        width=D,
        heads=H,
        kv_heads=HKV,
        key_dim=K,
        value_dim=V,
        position="none",
        quantizer={"kind": "none"},
    )
    block = TransformerVQ(config, seed=1).double().layers[0]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return block, torch.randn(2, T, D, generator=generator, dtype=torch.float64)


def normed(x):
    return x / (1e-6 + (x * x).mean(-1, keepdim=True)).sqrt()


def attention(y, block, value):
    """Heads side by side (2, T, H·V): query head h reads key head h // (H / Hkv); keys at length K^(1/4)."""
    projection = block.kvg_proj if hasattr(block, "kvg_proj") else block.kv_proj
    q, kv = y @ block.q_proj.weight.T, y @ projection.weight.T
    heads = []
    for h in range(H):
        g = h // (H // HKV)
        query = normed(q[..., h * K : (h + 1) * K]) / K**0.25
        key = normed(kv[..., g * K : (g + 1) * K]) / K**0.25
        values = value(kv[..., HKV * K + g * V : HKV * K + (g + 1) * V])
        rows = []
        for i in range(T):
            weights = torch.stack([(query[:, i] * key[:, j]).sum(-1) for j in range(i + 1)], -1).softmax(-1)
            rows.append(sum(weights[:, j, None] * values[:, j] for j in range(i + 1)))
        heads.append(torch.stack(rows, 1))
    return torch.cat(heads, -1), kv[..., HKV * (K + V) :]


def gau(block, x):
    o, gate = attention(normed(x) * block.norm.weight + block.norm.bias, block, silu)
    return x + (o * silu(gate)) @ block.out_proj.weight.T


def transformer(block, x):
    o, _ = attention(normed(x) * block.norm.weight + block.norm.bias, block, lambda v: v)
    x = x + o @ block.out_proj.weight.T
    y = normed(x) * block.mlp_norm.weight + block.mlp_norm.bias
    w1, w3 = block.mlp.up_proj.weight.chunk(2)
    return x + (silu(y @ w1.T) * (y @ w3.T)) @ block.mlp.down_proj.weight.T


@pytest.mark.parametrize("definition", [gau, transformer])
@torch.no_grad()
def test_block_is_its_equation(definition):
    block, x = block_and_input(definition.__name__)
    got, _, _ = block(
        x, Context(segments=None, mask=None, draws=None, places=torch.arange(x.shape[1])), Carried(None, None)
    )
    assert_same({"x": got}, {"x": definition(block, x)}, rtol=1e-12)


def test_hidden_width_is_eight_thirds_up_to_a_multiple_of_eight():
    assert block_and_input("transformer")[0].mlp.down_proj.in_features == 32
