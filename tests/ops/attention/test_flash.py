"""Kernels of other libraries for the strip, our own products for the cache: together the definition."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from attention_cases import attention_case, call, every_triple, run
from helpers import assert_same
from pydantic import ValidationError
from torch import Tensor

from transformer_vq.config import TransformerVQConfig
from transformer_vq.ops.attention import flash, flash_kernels, resolve_backend
from transformer_vq.ops.attention.arguments import Arguments
from transformer_vq.ops.attention.call import prepare
from transformer_vq.ops.attention.flash_kernels import FlashAttention2, FlashAttention3, OfPyTorch, OnCPU

SHAPES = [
    {},
    {"Hkv": 2, "H": 4, "rotary": True, "scale": 0.4},
    {"Hkv": 1, "H": 4, "mask": "random", "K": 6, "V": 9},
    {"cache": False, "rotary": True},
]
SIZES = [(67, 16, 24), (37, 8, 0), (29, 16, 5), (21, 4, 40), (16, 1, 3), (64, 16, 16)]


class Watched(OnCPU):
    """Counts what it is asked for; wrong on demand."""

    def __init__(self, wrong: bool = False) -> None:
        self.wrong, self.forwards, self.backwards = wrong, 0, 0

    def forward(self, q, k, v, scale, window):
        self.forwards += 1
        o, lse = super().forward(q, k, v, scale, window)
        return o, lse + 0.1 * self.wrong

    def backward(self, *arguments):
        self.backwards += 1
        return super().backward(*arguments)


def assert_equals_the_definition(case, state=None, rtol=1e-10):
    got, want = run(case, "flash", state), run(case, "quadratic", state)
    largest = max(x.abs().max() for n, x in want.items() if n.startswith("d"))
    for name in got:  # where one key alone is seen, some gradients are 0 and what is left is rounding
        if want[name].numel():
            size = largest if name.startswith("d") else want[name].abs().max().clamp_min(1e-30)
            assert (got[name] - want[name]).abs().max() <= rtol * size, name


@pytest.mark.parametrize(("shape", "sizes", "rule"), every_triple(SHAPES, SIZES), ids=str)
def test_equals_the_definition(shape, sizes, rule):
    (T, block_len, window), rule = sizes, {"gradients": rule[0], "grad_through_cache": rule[1]}
    assert_equals_the_definition(attention_case(T=T, block_len=block_len, window=window, **shape, **rule))


@pytest.mark.parametrize("shape", [{}, {"rotary": True, "scale": 0.4}, {"gradients": "block"}], ids=str)
def test_state_carries_over_under_a_moving_codebook(shape):
    case, state = attention_case(T=60, window=5, **shape), None
    for first, last in ((0, 9), (9, 10), (10, 60)):
        piece = case.tokens(first, last)
        codebook = case.tensors["codebook"] * (1 + 0.1 * first)
        k_hat = torch.take_along_dim(codebook[None], piece.tensors["codes"][..., None], dim=2)
        piece = replace(piece, tensors={**piece.tensors, "codebook": codebook, "k_hat": k_hat})
        assert_equals_the_definition(piece, state)
        _, state = call(piece, state, backend="flash")


def test_exact_keys_inside_the_window():
    case = attention_case(T=40, window=5, exact_window=True)
    keys = case.tensors["k_hat"] + 0.3 * torch.randn_like(case.tensors["k_hat"])
    assert_equals_the_definition(replace(case, tensors={**case.tensors, "k_hat": keys}))


@pytest.mark.parametrize(("gradients", "calls"), [("window", 2), ("block", 1)])
def test_the_kernel_does_the_strips_and_can_be_another(monkeypatch, gradients, calls):
    case = attention_case(T=64, window=8, block_len=8, gradients=gradients)
    watched = Watched()
    monkeypatch.setattr(flash, "provider", lambda device: watched)
    right = run(case, "flash")
    assert (watched.forwards, watched.backwards) == (calls, calls)
    monkeypatch.setattr(flash, "provider", lambda device: Watched(wrong=True))
    with pytest.raises(AssertionError, match="relative error"):
        assert_same(run(case, "flash"), right, rtol=1e-3)


def test_every_note_is_written():
    """New memory is filled with NaN, so that what is forgotten shows: notes are outputs of an op, and compared."""
    case = attention_case(T=37, window=5, block_len=8, H=4, rotary=True)
    ready = prepare(Arguments(**case.tensors, **case.options, **case.extra))
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        notes = flash.notes(ready)
        assert flash.forward(ready, notes).isfinite().all() and all(x.isfinite().all() for x in notes)
    finally:
        torch.use_deterministic_algorithms(False)


def test_narrow_values_do_not_cost_the_others_their_digits():
    case = attention_case(T=40, window=5)
    case = replace(case, tensors={**case.tensors, "v": case.tensors["v"].float()}, weights=case.weights.float())
    assert_equals_the_definition(case, rtol=1e-6)
    got, want = run(case, "flash"), run(case, "quadratic")
    assert_same({"dq": got["dq"]}, {"dq": want["dq"]}, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [{}, {"rotary": True, "scale": 0.25}], ids=str)
def test_16_bits(dtype, shape):
    narrow = attention_case(T=90, window=12, block_len=16, K=16, V=16, H=4, dtype=dtype, **shape)
    tensors = {n: x.double() if x.is_floating_point() else x for n, x in narrow.tensors.items()}
    want = run(replace(narrow, tensors=tensors, weights=narrow.weights.double()), "quadratic")
    got = run(narrow, "flash")
    names = ("o", "dq", "dk_hat", "dv")
    assert all(got[name].dtype == dtype for name in names)
    assert_same({n: got[n].double() for n in names}, {n: want[n] for n in names}, rtol=2e-2)


@pytest.mark.parametrize(
    ("shape", "says"), [({"bias": (1, 13)}, "take no bias"), ({"segments": True}, "not segments")], ids=str
)
def test_what_it_cannot_do_is_refused_in_one_line(shape, says):
    with pytest.raises(ValueError, match=says) as error:
        call(attention_case(**shape), backend="flash")
    assert "\n" not in str(error.value) and "take triton, wide or blockwise" in str(error.value)


def test_where_there_is_no_kernel_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(flash, "provider", lambda device: None)
    with pytest.raises(ValueError, match=r"backend flash: needs flash_attn: pip install 'transformer-vq\[flash\]'"):
        resolve_backend("flash", "cuda", 9, 4, 3)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="tensors are on meta"):
        resolve_backend("flash", "meta", 9, 4, 3)


def test_a_model_with_a_bias_is_refused_before_it_is_made():
    with pytest.raises(ValidationError, match="backend = flash: needs position: rotary or none, not xl"):
        TransformerVQConfig(vocab_size=8, backend="flash", position="xl")
    assert TransformerVQConfig(vocab_size=8, backend="flash", position="rotary").backend == "flash"


def test_auto_never_takes_it():
    assert all(
        resolve_backend("auto", device, T, 64, 64)[0] != "flash" for device in ("cpu", "cuda") for T in (1, 20, 9000)
    )


def tensors(dtype=torch.float64) -> tuple[Tensor, ...]:
    """d_o, q, k, v (b, t, h, d): 6 queries at the end of 9 keys, two query heads a key head."""
    torch.manual_seed(0)
    return tuple(torch.randn(3, t, h, 8, dtype=dtype) for t, h in ((6, 4), (6, 4), (9, 2), (9, 2)))


@pytest.mark.parametrize("window", [None, 2])
def test_a_kernel_is_attention_at_the_end_of_its_keys(window):
    d_o, q, k, v = tensors()
    learn = [x.clone().requires_grad_() for x in (q, k, v)]
    x = torch.einsum("bihgd,bjhd->bhgij", learn[0].unflatten(2, (2, 2)), learn[1]) * 0.5
    i, j = torch.arange(6)[:, None] + 3, torch.arange(9)
    hidden = (j > i) | (i - j > (9 if window is None else window))
    x = x.masked_fill(hidden, float("-inf"))
    o = torch.einsum("bhgij,bjhd->bihgd", x.softmax(-1), learn[2]).flatten(2, 3)
    want = {"o": o, "lse": x.logsumexp(-1).flatten(1, 2)}
    want |= dict(zip(("dq", "dk", "dv"), torch.autograd.grad(o, learn, d_o), strict=True))
    o, lse = OnCPU().forward(q, k, v, 0.5, window)
    grads = OnCPU().backward(d_o, q, k, v, o, lse, 0.5, window)
    got = {"o": o, "lse": lse} | dict(zip(("dq", "dk", "dv"), grads, strict=True))
    assert_same(got, {name: y.detach() for name, y in want.items()}, rtol=1e-12)


def as_flash_attention_2() -> dict[str, ModuleType]:
    """Stand-ins with the entries of flash-attn 2.7 and later, name by name and in their order."""

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        assert causal and window_size_right == 0 and dropout_p == softcap == 0 and alibi_slopes is None
        window = None if window_size_left < 0 else window_size_left
        return *OnCPU().forward(q, k, v, softmax_scale, window), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert causal and window_size_right == 0 and dropout_p == softcap == 0 and deterministic is False
        window = None if window_size_left < 0 else window_size_left
        found = OnCPU().backward(dout, q, k, v, out, softmax_lse, softmax_scale, window)
        for target, x in zip((dq, dk, dv), found, strict=True):
            target.copy_(x)

    package, module = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    module._flash_attn_forward, module._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
    package.flash_attn_interface, package.__path__ = module, []
    package.__spec__, module.__spec__ = (
        ModuleSpec("flash_attn", None),
        ModuleSpec("flash_attn.flash_attn_interface", None),
    )
    return {"flash_attn": package, "flash_attn.flash_attn_interface": module}


def as_flash_attention_3() -> dict[str, ModuleType]:
    """The same with those of its Hopper build, since July 2025."""
    two = as_flash_attention_2()["flash_attn"].flash_attn_interface

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None,
        sm_margin=0,
    ):  # fmt: skip
        return two._flash_attn_forward(
            q, k, v, 0.0, softmax_scale, True, window_size_left, window_size_right, softcap, None, False
        )

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        two._flash_attn_backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, 0.0, softmax_scale, True, window_size_left, window_size_right,
            softcap, None, deterministic,
        )  # fmt: skip

    module = ModuleType("flash_attn_interface")
    module.__spec__ = ModuleSpec("flash_attn_interface", None)
    module._flash_attn_forward, module._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
    return {"flash_attn_interface": module}


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(
    ("kernel", "modules"),
    [(FlashAttention2(), as_flash_attention_2()), (FlashAttention3(), as_flash_attention_3())],
    ids=["2", "3"],
)
def test_installed_packages_are_called_by_their_own_names(monkeypatch, kernel, modules, rotary):
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flash, "provider", lambda device: kernel)
    assert_equals_the_definition(attention_case(T=50, window=6, rotary=rotary, H=4))


def test_the_newest_kernels_that_have_our_entries_are_taken(monkeypatch):
    """Of what is installed; on a GPU that is not of Hopper, and from older entries or none, the next."""

    @torch.library.custom_op("transformer_vq_tests::entry", mutates_args=())
    def entry(x: Tensor) -> Tensor:
        return x.clone()

    two, three = as_flash_attention_2(), as_flash_attention_3()
    gpu, arch = torch.device("cuda"), [9]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (arch[0], 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert flash_kernels.provider(gpu) is None
    for name, module in {**two, **three}.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert isinstance(flash_kernels.provider(gpu), FlashAttention2)  # entries that are functions are older
    three["flash_attn_interface"]._flash_attn_forward = entry
    assert isinstance(flash_kernels.provider(gpu), FlashAttention3)
    arch[0] = 8
    assert isinstance(flash_kernels.provider(gpu), FlashAttention2)
    monkeypatch.delitem(sys.modules, "flash_attn.flash_attn_interface")
    assert flash_kernels.provider(gpu) is None


@pytest.mark.parametrize("window", [None, 2])
def test_pytorchs_own_kernel_takes_what_it_is_given(window):
    """Names and order of its arguments, by shapes alone."""
    d_o, q, k, v = (x.to("meta") for x in tensors(torch.bfloat16))
    o, lse = OfPyTorch().forward(q, k, v, 0.5, window)
    grads = OfPyTorch().backward(d_o, q, k, v, o, lse, 0.5, window)
    assert o.shape == q.shape and lse.shape == (3, 4, 6) and lse.dtype == torch.float32
    assert [g.shape for g in grads] == [x.shape for x in (q, k, v)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [{}, {"rotary": True}, {"gradients": "block"}, {"Hkv": 1}], ids=str)
def test_on_a_gpu_16_bit_errors_stay_small(dtype, shape):
    case = attention_case(T=1500, window=200, block_len=128, K=64, V=64, S=64, H=4, scale=0.125, dtype=dtype, **shape)
    exact = {n: x.double() if x.is_floating_point() else x for n, x in case.tensors.items()}
    want = run(replace(case, tensors=exact, weights=case.weights.double()), "quadratic")
    on_gpu = {n: x.cuda() for n, x in case.tensors.items()}
    extra = {n: x if x is None else x.cuda() for n, x in case.extra.items()}
    case = replace(case, tensors=on_gpu, weights=case.weights.cuda(), extra=extra)
    got, plain = run(case, "flash"), run(case, "quadratic")
    for name in ("o", "dq", "dk_hat", "dv"):
        error, usual = ((x[name].double().cpu() - want[name]).square().mean().sqrt() for x in (got, plain))
        assert error <= 2 * usual, name


@pytest.mark.gpu
def test_on_a_gpu_a_kernel_is_there():
    assert flash_kernels.provider(torch.device("cuda")) is not None
