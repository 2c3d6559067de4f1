"""Full attention, compared with loops over single queries and keys."""

from __future__ import annotations

import pytest
import torch
from attention_cases import attention_case, turned
from functorch.compile import make_boxed_func
from helpers import assert_same
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from transformer_vq.ops.attention import full, full_attention

SHAPES = [
    {},
    {"T": 1},
    {"H": 4, "Hkv": 2, "scale": 0.4},
    {"rotary": True, "H": 4, "Hkv": 1},
    {"bias": (1, 13), "segments": True},
    {"bias": (2, 13), "window": 1},
    {"bias": (2, 1), "window": 20},
    {"bias": (1, 1), "T": 1},
    {"bias": (2, 1), "mask": "left", "rotary": True},
    {"mask": "random", "segments": True},
    {"mask": "all", "bias": (2, 13)},
]


def run(shape: dict, pieces: list[int] | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Output and gradients: of the function called piece by piece, and of loops over the whole."""
    shape = dict(shape)
    scale = shape.pop("scale", None)
    case = attention_case(**shape)
    x = {n: t.clone().requires_grad_() for n, t in case.tensors.items() if n in ("q", "k_hat", "v", "bias")}
    T, M, state, first, parts = x["q"].shape[2], case.options["window"], None, 0, []
    for n in pieces or [T]:
        piece = case.tokens(first, first + n)
        q, k, v = (x[name][:, :, first : first + n] for name in ("q", "k_hat", "v"))
        bias = x["bias"] if "bias" in x and x["bias"].shape[2] == 1 else x.get("bias", torch.empty(1, 1, T))
        bias = None if "bias" not in x else bias if bias.shape[2] == 1 else bias[:, :, first : first + n]
        o, state = full_attention(q, k, v, M, scale=scale, bias=bias, state=state, **piece.extra)
        parts.append(o)
        first += n
    got = torch.cat(parts, dim=2)

    want = torch.zeros_like(got)
    mask, segments, rotary = (case.extra.get(name) for name in ("mask", "segments", "rotary"))
    B, H = got.shape[:2]
    for b in range(B):
        tokens = [t for t in range(T) if mask is None or mask[b, t]]
        ids = [0 if segments is None else int(segments[b, t]) for t in tokens]
        for h in range(H):
            g = h // (H // x["v"].shape[1])
            for i, t in enumerate(tokens):
                logits, values = [], []
                for j in range(i, -1, -1):
                    if ids[j] != ids[i]:
                        break
                    logit = turned(x["q"][b, h, t], x["k_hat"][b, g, tokens[j]], i - j, rotary) * (scale or 1)
                    if "bias" in x and i - j <= M:
                        logit = logit + x["bias"][b % x["bias"].shape[0], h, t % x["bias"].shape[2], i - j]
                    logits.append(logit)
                    values.append(x["v"][b, g, tokens[j]])
                want[b, h, t] = torch.stack(logits).softmax(0) @ torch.stack(values)

    def gradients(o: Tensor) -> dict[str, Tensor]:
        grads = torch.autograd.grad((o * case.weights).sum(), list(x.values()))
        return {"o": o.detach()} | {f"d{name}": grad for name, grad in zip(x, grads, strict=True)}

    return gradients(got), gradients(want)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_loops(shape):
    got, want = run(shape)
    if shape.get("T") == 1:  # one key: no gradient but that of its value
        got, want = ({n: g[n] for n in ("o", "dv")} for g in (got, want))
    assert_same(got, want, rtol=1e-12)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.get("T") != 1], ids=str)
def test_pieces_equal_the_whole(shape):
    got, want = run(shape, pieces=[4, 1, 8])
    assert_same({"o": got["o"], "dq": got["dq"]}, {"o": want["o"], "dq": want["dq"]}, rtol=1e-12)


def ranked(B: int = 3, P: int = 9, T: int = 14) -> tuple[Tensor, Tensor, Tensor]:
    """Ranks of queries and keys, and which keys count: some past ones are dead, and some tokens are padding."""
    generator = torch.Generator().manual_seed(2)
    counts = torch.rand(B, P + T, generator=generator) < torch.tensor([0.6, 0.95, 0.2])[:B, None]
    rank = counts.cumsum(1) - 1
    return rank[:, P:], rank, counts


@pytest.mark.parametrize("M", [0, 3, 40])
@pytest.mark.parametrize("shape", [(3, 14), (1, 14), (3, 1), (1, 1)])
def test_gradients_by_rank_are_those_of_a_gather(M, shape):
    """Where keys that do not count pass nothing on."""
    query_rank, rank, counts = ranked()
    bias = torch.randn(shape[0], 2, shape[1], M + 1, dtype=torch.float64, requires_grad=True)
    want = full.by_distance(bias, query_rank[:, :, None] - rank[:, None])
    got = full.ByRank.apply(bias.expand(*want.shape[:3], -1), query_rank, rank)
    weights = torch.randn(want.shape, dtype=torch.float64) * counts[:, None, None]
    (d_got,), (d_want,) = (torch.autograd.grad((x * weights).sum(), bias) for x in (got, want))
    assert torch.equal(got, want)
    assert d_want.any()
    assert_same({"d_bias": d_got}, {"d_bias": d_want}, rtol=1e-14)


@pytest.mark.parametrize("shape", [(1, 1), (2, 13)])
@pytest.mark.parametrize("extra", [{"mask": "left"}, {"mask": "random", "segments": True}, {"mask": "all"}], ids=str)
def test_no_gradient_is_lost_at_padding(monkeypatch, shape, extra):
    """Of the whole call, in pieces with a state: what a plain gather gives."""
    got, _ = run({"bias": shape, **extra}, pieces=[6, 1, 6])
    formula = lambda bias, query_rank, rank: full.by_distance(bias, query_rank[:, :, None] - rank[:, None])
    monkeypatch.setattr(full.ByRank, "apply", formula)
    want, _ = run({"bias": shape, **extra}, pieces=[6, 1, 6])
    assert torch.equal(got["o"], want["o"])
    assert_same(got, want, rtol=1e-13)


def test_the_bias_of_padded_rows_compiles_whole():
    """With gradient, which is gathered as the values are: nothing is added up by index."""
    graphs = []

    def look(graph, inputs):
        graphs.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    def attend(q, bias):
        return full_attention(q, q, q, 3, bias=bias, mask=mask)[0]

    q, mask = torch.randn(2, 2, 9, 4, dtype=torch.float64), torch.rand(2, 9) < 0.7
    bias = torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(attend, fullgraph=True, backend=aot_autograd(fw_compiler=look))
    (got,), (want,) = (torch.autograd.grad(f(q, bias).square().sum(), bias) for f in (compiled, attend))
    assert_same({"d_bias": got}, {"d_bias": want}, rtol=1e-12)
    assert any("searchsorted" in name for name in graphs)
    assert not [name for name in graphs if "scatter" in name or "index_put" in name or "index_add" in name]


def test_state_is_detached_and_knows_its_document():
    q, k, v = torch.randn(3, 2, 1, 5, 4, requires_grad=True).unbind()
    segments = torch.tensor([[3, 3, 4, 4, 4], [5, 5, 5, 5, 5]])
    _, state = full_attention(q, k, v, 2, segments=segments)
    assert not state.k.requires_grad and not state.v.requires_grad
    assert state.alive.tolist() == [[False, False, True, True, True], [True] * 5]
    assert state.segment.tolist() == [4, 5] and state.position.tolist() == [5, 5]


def test_bf16_keeps_its_type():
    q, k, v = torch.randn(3, 2, 1, 5, 4).bfloat16().unbind()
    o, state = full_attention(q, k, v, 2, bias=torch.randn(1, 1, 1, 3).bfloat16())
    assert o.dtype == state.k.dtype == torch.bfloat16 and o.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 2, 12, 4)}, r"k \(2, 2, 12, 4\)"),
        ({"q": torch.zeros(2, 3, 13, 4)}, r"q \(2, 3, 13, 4\)"),
        ({"bias": torch.zeros(1, 2, 1, 4)}, r"bias has shape \(1, 2, 1, 4\); it needs"),
        ({"rotary": torch.zeros(3)}, r"rotary has shape \(3,\)"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_arguments_are_told_with_their_shapes(change, message):
    arguments = {
        "q": torch.zeros(2, 2, 13, 4),
        "k": torch.zeros(2, 2, 13, 4),
        "v": torch.zeros(2, 2, 13, 3),
        "window": 4,
    }
    with pytest.raises(ValueError, match=message):
        full_attention(**{**arguments, **change})
