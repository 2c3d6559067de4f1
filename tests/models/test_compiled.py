"""The whole model is one graph for the compiler: quantizers that take notes, checkpoints, a state that is carried."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import assert_same
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from transformer_vq import TransformerVQ, TransformerVQConfig
from transformer_vq.ops import estimators
from transformer_vq.quantizers import QUANTIZERS, build_quantizer

SIZES = {"vocab_size": 32, "layers": 2, "width": 16, "key_dim": 8, "value_dim": 8, "window": 4, "block_len": 4}
MODELS = {
    "gau": {"quantizer": {"kind": "vq", "codes": 8, "dead_code_threshold": 1.0, "commit_schedule": [[0, 1], [9, 2]]}},
    "checkpointed": {
        "checkpoint_activations": True,
        "block_len": "auto",
        "quantizer": {"kind": "vq", "codes": 8, "estimator": "rotation"},
    },
    "transformer": {
        "block": "transformer",
        "position": "rotary",
        "heads": 2,
        "quantizer": {"kind": "fsq", "levels": [4]},
    },
    "simvq": {"position": "scalar", "conv": 3, "quantizer": {"kind": "simvq", "codes": 8}},
}
KINDS = {
    "fsq": {"levels": [4, 2], "expansion": "mlp"},
    "ifsq": {"levels": [4, 2]},
    "lfq": {"bits": 3},
    "bsq": {"bits": 3},
    "none": {},
    "simvq": {"codes": 8, "estimator": "rotation"},
}
EVERY = {kind: {"quantizer": {"kind": kind, **more}} for kind, more in KINDS.items()}
LEARNED = {"codes": 8, "codebook": "gradient"}  # some estimators hand gradients to the codes
EVERY |= {f"vq, {name}": {"quantizer": {**LEARNED, "estimator": name}} for name in estimators.names()}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gau", "transformer", "simvq")]


def model_and_text(name: str, **sizes: int) -> tuple[TransformerVQ, Tensor]:
    model = TransformerVQ(TransformerVQConfig(**{**SIZES, **(MODELS | EVERY)[name], **sizes}))
    return model, torch.randint(32, (2, 73), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["checkpointed", *SLOW])
def test_training_is_one_graph_that_gives_what_eager_gives(name):
    eager, text = model_and_text(name)
    compiled = copy.deepcopy(eager)
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")

    def steps(model: TransformerVQ, function) -> dict[str, Tensor]:
        seen = {}
        for step in range(3):
            model.set_step(step)
            out = function(text[:, :-1], labels=text[:, 1:])
            out.loss.backward()
            model.apply_codebook_statistics()
            seen[f"loss{step}"] = out.loss.detach()
            seen |= {f"step {step}: d{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
        return seen | {n: b.double() for n, b in model.named_buffers()}

    assert_same(steps(compiled, call), steps(eager, eager), rtol=1e-5)


def test_every_kind_of_quantizer_is_there():
    assert {settings["quantizer"].get("kind", "vq") for settings in EVERY.values()} == set(QUANTIZERS)


def breaks(call: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Graph breaks of a call and its backward pass, counted; each but the first graph is one too."""
    torch._dynamo.reset()
    counters.clear()
    graphs = CompileCounter()
    torch.compile(call, backend=graphs)(x).backward()
    return max(graphs.frame_count - 1, sum(counters["graph_break"].values()))


ALIKE = {
    f"vq, {name}"
    for name in ("rotation_tangent", "rotation_centred", "scale", "rotation_unscaled", "reflection", "reinmax", "ibq")
}
"""Whose code is that of others up to a formula."""


@pytest.mark.parametrize(
    ("name", "masked"),
    [
        *((name, False) for name in ["gau", *EVERY] if name not in ALIKE),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in sorted(ALIKE)),
        ("gau", True),
        ("fsq", True),
        ("vq, gumbel", True),
    ],
)
def test_no_quantizer_breaks_the_graph(name, masked):
    """By itself, which is quick: the rest of the model is the same for all."""
    quantizer = build_quantizer({"kind": "vq", **(MODELS | EVERY)[name]["quantizer"]}, 2, 8)
    k, mask = torch.randn(2, 2, 9, 8, requires_grad=True), torch.rand(2, 9) < 0.7 if masked else None

    def loss(k: Tensor) -> Tensor:
        out = quantizer(k, mask)
        return out.quantized.square().sum() + out.loss

    assert breaks(loss, k) == 0, counters["graph_break"]
    assert k.grad.isfinite().all() and k.grad.any()


def test_a_graph_break_is_counted():
    k = torch.ones(3, requires_grad=True)
    assert breaks(lambda k: (k * float(k.detach().sum())).sum(), k) == 1
    assert breaks(lambda k: (k * k.detach().sum().item()).sum() if k.sum() > 0 else k.sum(), k) > 0


WHOLE = ("gau", "none")  # both kinds of attention; quantizers are counted above


@pytest.mark.parametrize(
    ("name", "layers"), [(n, 1) for n in WHOLE] + [pytest.param(n, 2, marks=pytest.mark.slow) for n in ("gau", *EVERY)]
)
def test_no_graph_break(name, layers):
    torch._dynamo.reset()
    model, text = model_and_text(name, layers=layers)
    told = torch._dynamo.explain(lambda x, y: model(x, labels=y).loss)(text[:, :-1], text[:, 1:])
    assert told.graph_break_count == 0, told.break_reasons


@pytest.mark.slow
def test_the_step_does_not_compile_anew():
    torch._dynamo.reset()
    model, text = model_and_text("gau")
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(
        error_on_recompile=False, recompile_limit=3
    ):  # notes absent, notes there, one to spare
        for step in range(12):
            model.set_step(step)
            call(text[:, :-1], labels=text[:, 1:]).loss.backward()
            model.apply_codebook_statistics()
