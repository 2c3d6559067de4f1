"""One way from a backend's name to the backend."""

import inspect

import pytest
import torch
from attention_cases import attention_case, call

from transformer_vq.ops import vq_attention
from transformer_vq.ops.attention import BACKENDS, dispatch, native, resolve_backend
from transformer_vq.ops.attention.arguments import Arguments
from transformer_vq.ops.attention.call import prepare
from transformer_vq.ops.attention.choice import Look, choose


def test_auto_says_what_it_takes_and_why(monkeypatch):
    monkeypatch.setattr(dispatch, "native_lack", lambda: "needs a C++ compiler")
    chosen = {T: resolve_backend("auto", "cpu", T, 4, 3) for T in (1, 16, 4096)}
    assert {T: name for T, (name, _) in chosen.items()} == {1: "recurrent", 16: "quadratic", 4096: "blockwise"}
    assert all(reason for _, reason in chosen.values())
    assert resolve_backend("recurrent", torch.device("cpu"), 4096, 4, 3)[0] == "recurrent"


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("T", "K", "V", "dtype", "arch", "triton", "name", "why"),
    [
        (1, 128, 128, BF16, 90, True, "recurrent", "one token"),
        (32, 128, 128, BF16, 90, True, "quadratic", "at most 32"),
        (33, 128, 128, BF16, 90, True, "triton", "bf16"),
        (4096, 256, 256, FP16, 80, True, "triton", "fp16"),
        (4096, 128, 1536, BF16, 90, True, "wide", "1536 wide"),
        (4096, 128, 1536, BF16, 90, False, "wide", "1536 wide"),
        (4096, 512, 128, BF16, 90, True, "blockwise", "keys are 512 wide"),
        (4096, 64, 64, FP32, 90, True, "triton", "fp32 up to 64 wide"),
        (4096, 64, 64, FP32, 80, True, "blockwise", "registers"),
        (4096, 64, 65, FP32, 90, True, "blockwise", "registers"),
        (4096, 64, 1536, FP32, 90, True, "blockwise", "registers"),
        (4096, 64, 64, FP64, 90, True, "blockwise", "do not take fp64"),
        (4096, 128, 128, BF16, 90, False, "blockwise", "needs triton: pip install"),
        (4096, 128, 128, FP16, 75, True, "blockwise", "begin with sm_80, and this GPU is sm_75"),
        (4096, 64, 64, FP32, 90, False, "blockwise", "needs triton: pip install"),
    ],
)
def test_auto_on_a_gpu(T, K, V, dtype, arch, triton, name, why):
    found, reason = choose(Look("cuda", T, K, V, dtype, arch, triton))
    assert found == name and found in BACKENDS and why in reason and "\n" not in reason


def test_auto_without_a_gpu_takes_what_is_compiled_for_the_processor_and_never_a_gpus_kernels():
    for dtype in (BF16, FP32, FP64):
        assert choose(Look("cpu", 4096, 64, 64, dtype, triton=True, native=None))[0] == "native"
        name, why = choose(Look("cpu", 4096, 64, 64, dtype, triton=True, native="needs a C++ compiler"))
        assert name == "blockwise" and "needs a C++ compiler" in why


def test_auto_gives_what_the_chosen_one_gives():
    for T in (1, 16, 200):
        case = attention_case(T=T)
        name, _ = resolve_backend("auto", "cpu", T, 4, 3)
        assert torch.equal(call(case)[0], call(case, backend=name)[0])


def test_a_backend_of_ones_own():
    case = attention_case()
    o, _ = call(case, backend="transformer_vq.ops.attention.quadratic:quadratic")
    assert torch.equal(o, call(case, backend="quadratic")[0])


def test_every_backend_takes_an_empty_call():
    for name in BACKENDS.keys() - {"triton", *(["native"] if native.refusal("cpu") else [])}:  # one needs a GPU
        assert call(attention_case(T=0), backend=name)[0].shape == (2, 2, 0, 3)


def test_the_signature_is_the_list_of_arguments():
    shown = inspect.signature(vq_attention).parameters
    assert list(shown)[:5] == ["q", "k_hat", "v", "codes", "codebook"]
    assert shown["scale"].default is None and shown["window"].kind is inspect.Parameter.KEYWORD_ONLY
    with pytest.raises(TypeError, match="windw"):
        call(attention_case(), windw=3)


def test_tensors_reach_a_backend_in_their_own_type():
    case = attention_case(dtype=torch.bfloat16, scale=0.3, bias=(1, 13))
    _, state = call(case)
    ready = prepare(Arguments(**case.tensors, **case.options, state=state))
    own = (ready.q, ready.k_hat, ready.v, ready.codebook, ready.bias, ready.state.k_hat, ready.state.v)
    assert {x.dtype for x in own} == {torch.bfloat16} and ready.scale == 0.3
    assert ready.state.count.dtype == ready.state.mean.dtype == torch.float32
    rows = torch.take_along_dim(ready.codebook[None], ready.codes[..., None], dim=2)
    assert torch.equal(rows, ready.k_hat)
    wide = ready.wide()
    assert wide.q.dtype == wide.state.v.dtype == wide.bias.dtype == torch.float32 and wide.scale is None
    assert torch.equal(wide.q, ready.q.float() * 0.3)
