"""The op around the backends: what the compiler and autograd see of them."""

from __future__ import annotations

import pytest
import torch
from attention_cases import LEARN, attention_case, call, run
from helpers import assert_same
from torch import Tensor

from transformer_vq.ops.attention import BACKENDS, native, op
from transformer_vq.ops.attention.arguments import Arguments
from transformer_vq.ops.attention.call import Call, prepare

OWN = "transformer_vq.ops.attention.quadratic:quadratic"
EVERYTHING = {"bias": (1, 13), "segments": True, "mask": "random", "rotary": True, "scale": 0.3, "H": 4}


def ready(backend: str, **shape) -> Call:
    case = attention_case(**shape, backend=backend)
    return prepare(Arguments(**case.tensors, **case.options, **case.extra)).with_leaves()


NARROW = {"cache": False, "dtype": torch.bfloat16}
PLAIN = {"rotary": True, "scale": 0.3, "H": 4, "mask": "random", "T": 20}
ABSENT = ["native"] if native.refusal("cpu") else []
IN_THE_SUITE = [("blockwise", EVERYTHING), (OWN, NARROW), ("flash", PLAIN), ("native", EVERYTHING)]
IN_THE_SUITE = [case for case in IN_THE_SUITE if case[0] not in ABSENT]
HERE = [name for name in BACKENDS if name not in ("triton", "flash", *ABSENT)]  # one needs a GPU, one takes no bias
REST = [(name, shape) for name in (*HERE, OWN) for shape in ({}, EVERYTHING, NARROW)]
CASES = [*IN_THE_SUITE, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST if case not in IN_THE_SUITE)]


@pytest.mark.parametrize(("backend", "shape"), CASES, ids=str)
def test_opcheck(backend, shape):
    forward = op.attend_op._opoverload
    values = op.flat(ready(backend, **shape))
    torch.library.opcheck(forward, (*values, True))
    torch.library.opcheck(forward, (*values, False), test_utils=("test_schema", "test_faketensor"))
    o, *notes = op.attend_op(*values, True)
    detached = (*(x.detach() if isinstance(x, Tensor) else x for x in values), o.detach(), notes, torch.randn_like(o))
    backward = op.attend_backward_op._opoverload
    torch.library.opcheck(backward, detached, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("backend", "shape"), [("blockwise", EVERYTHING), pytest.param(OWN, {}, marks=pytest.mark.slow)], ids=str
)
def test_a_compiled_call_gives_what_the_call_gives(backend, shape):
    case = attention_case(**shape, backend=backend)
    learn = {name: x.clone().requires_grad_() for name, x in case.tensors.items() if name in LEARN}
    fixed = {name: x for name, x in case.tensors.items() if name not in LEARN}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def twice(learn: dict[str, Tensor]) -> dict[str, Tensor]:
        o, state = call(attention_case_of(case, learn | fixed))
        again, after = call(attention_case_of(case, learn | fixed), state)
        return {"o": o, "again": again, **{f"state.{name}": x.double() for name, x in after._asdict().items()}}

    def everything(function) -> dict[str, Tensor]:
        out = function(learn)
        grads = torch.autograd.grad((out["again"] * out["o"] * case.weights).sum(), list(learn.values()))
        return {name: x.detach() for name, x in out.items()} | dict(zip(learn, grads, strict=True))

    assert_same(everything(twice), everything(twice._torchdynamo_orig_callable), rtol=1e-12)


def attention_case_of(case, tensors):
    return type(case)(tensors, case.options, case.weights, case.extra)


@pytest.mark.parametrize("backend", HERE)
def test_unwrapped_and_within_the_op_are_the_same(backend):
    case = attention_case(T=29, window=5, bias=(1, 29), rotary=True, segments=True)
    case = case.with_options(scale=0.3)
    x = prepare(Arguments(**case.tensors, **case.options, **case.extra)).with_leaves()
    o = BACKENDS[backend](x)
    weights = case.weights.unflatten(1, o.shape[1:3])
    grads = dict(
        zip(("dq", "dk_hat", "dv", "dbias"), torch.autograd.grad((o * weights).sum(), x.learned()), strict=True)
    )
    want = run(case, backend)
    got = {"o": o.detach(), **grads}
    assert_same({n: g.reshape(want[n].shape) for n, g in got.items()}, {n: want[n] for n in got}, rtol=1e-12)


@pytest.mark.parametrize("backend", HERE)
def test_16_bit_tensors_have_gradients_of_their_type_as_good_as_it_allows(backend):
    narrow = attention_case(T=40, window=6, K=8, V=8, bias=(1, 40), dtype=torch.bfloat16)
    tensors = {n: x.double() if x.is_floating_point() else x for n, x in narrow.tensors.items()}
    exact = run(type(narrow)(tensors, narrow.options, narrow.weights.double()), "quadratic")
    got = run(narrow, backend)
    assert got["o"].dtype == got["dq"].dtype == got["dv"].dtype == got["dbias"].dtype == torch.bfloat16
    # one rounding of the result, and of dL/do, which arrives in bf16
    assert_same({n: x.double() for n, x in got.items()}, exact, rtol=2**-7)


def test_mixed_devices_are_found_by_shapes_alone():
    x = ready("blockwise")
    values = op.flat(x)
    meta = [y.to("meta") if isinstance(y, Tensor) and i > 0 else y for i, y in enumerate(values)]
    with pytest.raises(ValueError, match="cpu, meta"):
        op.on_one_device(op.unflat(meta))


def test_a_state_that_comes_in_gets_no_gradient_and_is_not_changed():
    _, state = call(attention_case(T=9, seed=1))
    before = [x.clone() for x in state]
    case = attention_case()
    run(case, "blockwise", state)
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
