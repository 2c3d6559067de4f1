"""The learned codebook: what moves it, when, and what must not."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from transformer_vq.config import ConfigError
from transformer_vq.ops.nearest import lookup
from transformer_vq.quantizers import build_quantizer

H, K, S = 2, 6, 8


def keys(B=3, T=10, dtype=torch.float64, seed=0):
    return torch.randn(B, H, T, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def vq(dtype=torch.float64, **settings):
    return build_quantizer({"kind": "vq", "codes": S, **settings}, H, K).to(dtype)


def sums(k, codes, mask):
    """Σ of keys and their number per code, one token at a time."""
    total, count = torch.zeros(H, S, K, dtype=torch.float64), torch.zeros(H, S, dtype=torch.float64)
    for b in range(k.shape[0]):
        for t in range(k.shape[2]):
            for h in range(H):
                if mask is None or mask[b, t]:
                    total[h, codes[b, h, t]] += k[b, h, t].double()
                    count[h, codes[b, h, t]] += 1
    return total, count


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", ["ste", "rotation", "random_rotation", "diveq"])
def test_quantized_keys_are_rows_of_the_codebook_bit_for_bit(dtype, estimator):
    q = vq(dtype, estimator=estimator)
    out = q(keys(dtype=dtype))
    assert out.quantized.dtype == dtype
    assert torch.equal(out.quantized, lookup(q.codebook.to(dtype), out.codes))
    assert out.loss.dtype == out.commitment.dtype == torch.promote_types(dtype, torch.float32)


def test_initial_codebook_is_the_papers():
    q = build_quantizer({"kind": "vq", "codes": 512}, 4, 64)
    assert torch.equal(q.ema_count, torch.ones(4, 512))
    assert q.ema_sum.std().item() == pytest.approx((4 * 512) ** -0.5, rel=0.02)
    again, other = (build_quantizer({"kind": "vq", "codes": 512}, 4, 64, layer=i) for i in (0, 1))
    assert torch.equal(again.ema_sum, q.ema_sum)
    assert not torch.equal(other.ema_sum, q.ema_sum)


def test_codebook_has_a_floor_under_its_counts():
    q = vq()
    q.ema_count[0, 0] = 1e-6
    assert_same({"row": q.codebook[0, 0]}, {"row": q.ema_sum[0, 0] / 0.01}, rtol=1e-15)


def test_commitment_sums_over_heads_and_width_and_averages_over_real_tokens():
    q, k = vq(commit=0.25), keys().requires_grad_()
    mask = torch.rand(3, 10, generator=torch.Generator().manual_seed(1)) > 0.4
    out = q(k, mask)
    rows = lookup(q.codebook, out.codes)
    want = sum((k[b, :, t] - rows[b, :, t]).square().sum() for b in range(3) for t in range(10) if mask[b, t])
    assert_same({"c": out.commitment}, {"c": want / mask.sum()}, rtol=1e-12)
    assert_same({"l": out.loss}, {"l": 0.25 * out.commitment}, rtol=1e-15)
    (grad,) = torch.autograd.grad(out.loss, k)
    want = 0.25 * 2 * (k - rows) * mask[:, None, :, None] / mask.sum()
    assert_same({"k": grad}, {"k": want.detach()}, rtol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_ema_update_is_the_formula_and_happens_once_per_step(masked):
    q = vq(ema=0.9)
    old = q.ema_sum.clone(), q.ema_count.clone()
    total, count = 0, 0
    for seed in range(3):  # micro-batches of one step
        k = keys(seed=seed)
        mask = torch.rand(3, 10, generator=torch.Generator().manual_seed(seed)) > 0.3 if masked else None
        codes = q(k, mask).codes
        more = sums(k, codes, mask)
        total, count = total + more[0], count + more[1]
        assert torch.equal(q.ema_sum, old[0])  # a forward pass moves nothing
    assert_same(dict(zip("sc", q.pending(), strict=True)), dict(zip("sc", (total, count), strict=True)), rtol=1e-14)
    q.apply_codebook_statistics()
    want = {"sum": 0.9 * old[0] + 0.1 * total, "count": 0.9 * old[1] + 0.1 * count}
    assert_same({"sum": q.ema_sum, "count": q.ema_count}, want, rtol=1e-14)
    q.apply_codebook_statistics()  # nothing collected since: nothing moves
    assert_same({"sum": q.ema_sum, "count": q.ema_count}, want, rtol=1e-14)


def test_evaluation_and_discarded_steps_move_nothing():
    q = vq()
    q.eval()(keys())
    q.apply_codebook_statistics()
    q.train()(keys())
    q.discard_codebook_statistics()
    q.apply_codebook_statistics()
    assert torch.equal(q.ema_count, torch.ones(H, S, dtype=torch.float64))


def test_a_step_of_padding_alone_moves_nothing():
    q = vq()
    out = q(keys(), torch.zeros(3, 10, dtype=torch.bool))
    q.apply_codebook_statistics()
    assert out.loss == 0
    assert torch.equal(q.ema_count, torch.ones(H, S, dtype=torch.float64))
    assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("estimator", ["ste", "random_rotation"])
def test_activation_checkpointing_counts_once_and_repeats_the_noise(use_reentrant, estimator):
    weight = torch.randn(K, K, dtype=torch.float64, requires_grad=True)
    results = []
    for recompute in (False, True):
        q = vq(estimator=estimator)
        q.set_step(3)

        def block(x, q=q):
            out = q(x @ weight)
            return out.quantized.square().sum() + out.loss

        x = keys().requires_grad_()
        loss = checkpoint(block, x, use_reentrant=use_reentrant) if recompute else block(x)
        grads = torch.autograd.grad(loss, (x, weight)) if not use_reentrant else _backward(loss, x, weight)
        results.append({"x": grads[0], "w": grads[1], **dict(zip("sc", q.pending(), strict=True))})
    assert_same(results[1], results[0], rtol=1e-14)


def _backward(loss, x, weight):
    """Gradients by `backward`, which is all that reentrant checkpointing knows."""
    weight.grad = None
    loss.backward()
    return x.grad, weight.grad.clone()


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**20),
    estimator=st.sampled_from(["ste", "rotation"]),
    codebook=st.sampled_from(["ema", "gradient"]),
)
def test_padding_is_invisible(seed, estimator, codebook):
    """Whatever stands at padding: losses, metrics, gradients and statistics of real tokens agree."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, 10, generator=generator) > 0.5
    outs = []
    for filling in (0.0, 1e3):
        q = vq(estimator=estimator, codebook=codebook, commit=0.5, diversity_weight=0.1, dead_code_threshold=0.7)
        k = torch.where(mask[:, None, :, None], keys(seed=seed), filling).requires_grad_()
        out = q(k, mask)
        (grad,) = torch.autograd.grad(out.loss, k)
        q.apply_codebook_statistics()
        assert not grad[~mask[:, None].expand(3, H, 10)].any()
        outs.append({"loss": out.loss, "grad": grad, "codebook": q.codebook.detach(), **out.metrics})
    assert_same(outs[1], outs[0], rtol=1e-14)


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_statistics_stay_wide_when_the_model_is_cast(codebook):
    q = torch.nn.Sequential(vq(torch.float32, codebook=codebook))
    before = q[0].ema_count.clone()
    for cast in (q.bfloat16, q.half, lambda: q.to(torch.bfloat16)):
        cast()
        assert q[0].ema_count.dtype == torch.float32
        assert codebook == "gradient" or q[0].ema_sum.dtype == torch.float32
    assert torch.equal(q[0].ema_count, before)
    out = q[0](keys(dtype=torch.bfloat16))
    assert out.quantized.dtype == torch.bfloat16
    q[0].apply_codebook_statistics()
    assert q.double()[0].ema_count.dtype == torch.float64


def test_gradient_codebook_learns_from_its_loss_alone_with_ste():
    q = vq(codebook="gradient", codebook_weight=0.5, commit=0.25)
    k = keys().requires_grad_()
    out = q(k)
    assert_same({"loss": out.loss}, {"loss": 0.75 * out.commitment}, rtol=1e-14)
    (attention,) = torch.autograd.grad(out.quantized.sum(), q.weight, allow_unused=True, retain_graph=True)
    assert attention is None  # the codebook is a constant to what follows
    (grad,) = torch.autograd.grad(out.loss, q.weight)
    total, count = sums(k.detach(), out.codes, None)
    assert_same({"w": grad}, {"w": 0.5 * 2 * (count[..., None] * q.weight.detach() - total) / 30}, rtol=1e-12)


@pytest.mark.parametrize("estimator", ["diveq", "ibq", "reinmax", "gumbel"])
def test_estimators_that_teach_the_codebook_reach_it(estimator):
    q = vq(codebook="gradient", estimator=estimator, codebook_weight=0.0)
    out = q(keys())
    (grad,) = torch.autograd.grad(out.quantized.square().sum(), q.weight)
    moved = (grad.abs().sum(-1) > 0).sum()
    assert moved == out.codes.transpose(0, 1).flatten(1).add(torch.arange(H)[:, None] * S).unique().numel() or (
        estimator != "diveq" and moved == H * S
    )


def test_dead_codes_become_keys_of_the_step_with_sums_and_counts():
    q = vq(dead_code_threshold=0.995, ema=0.5)
    q.age.fill_(q.time - 1)
    k = keys()
    codes = q(k).codes
    count = sums(k, codes, None)[1]
    q.apply_codebook_statistics()
    dead = 0.5 + 0.5 * count < 0.995
    assert dead.any() and not dead.all()
    every = k.transpose(0, 1).flatten(1, 2)
    for h, s in dead.nonzero().tolist():
        assert (q.codebook[h, s] == every[h]).all(-1).any()
        assert q.ema_count[h, s] == 1
    rows = q.codebook[dead]
    assert len(rows.unique(dim=0)) == len(rows)  # no key twice
    assert torch.equal(q.ema_count[~dead], (0.5 + 0.5 * count)[~dead])


def test_dead_codes_of_a_gradient_codebook_are_replaced_in_place():
    q = vq(codebook="gradient", dead_code_threshold=2.0, ema=0.5)
    parameter, old = q.weight, q.weight.detach().clone()
    q.age.fill_(q.time - 1)
    q(keys(B=1, T=4))
    q.apply_codebook_statistics()
    assert q.weight is parameter
    changed = (q.weight != old).any(-1)
    assert changed.any()
    assert torch.equal(q.ema_count[changed], torch.full_like(q.ema_count[changed], 2.0))
    assert changed.sum(-1).max() <= 4  # there were four keys to take


def test_replacement_draws_depend_on_the_step():
    def replaced(step):
        q = vq(dead_code_threshold=1e6)
        q.set_step(step)
        q.age.fill_(q.time)
        q.ema_count.zero_()
        q(keys())
        q.apply_codebook_statistics()
        return q.codebook

    assert torch.equal(replaced(1), replaced(1))
    assert not torch.equal(replaced(1), replaced(2))


@pytest.mark.parametrize("init", ["kmeans", "data"])
@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_first_codebook_comes_from_the_first_training_batch(init, codebook):
    q = vq(init=init, codebook=codebook)
    before = q.codebook.detach().clone()
    q.eval()(keys())
    assert torch.equal(q.codebook, before)
    mask = torch.arange(10) < 7
    q.train()(keys(), mask.expand(3, 10))
    first = q.codebook.detach().clone()
    assert q.started == 1
    real = keys()[:, :, :7].transpose(0, 1).flatten(1, 2)
    if init == "data":
        assert all((row == real[h]).all(-1).any() for h in range(H) for row in first[h])
    q(keys(seed=1))
    assert torch.equal(q.codebook, first)


def test_a_loaded_quantizer_does_not_start_again():
    q = vq(init="kmeans", start_step=2)
    q.set_step(2)
    q(keys())
    resumed = vq(init="kmeans", start_step=2)
    assert resumed.warming_up
    resumed.load_state_dict(q.state_dict())
    assert not resumed.warming_up
    resumed(keys(seed=5))
    assert torch.equal(resumed.codebook, q.codebook)
    assert not resumed.eval().warming_up


@pytest.mark.parametrize("settings", [dict(init="kmeans"), dict(init="data"), dict(start_step=1)])
def test_too_few_keys_for_a_first_codebook(settings):
    q = vq(**settings)
    q.set_step(1)
    with pytest.raises(ConfigError, match="3 a head are fewer than codes = 8") as caught:
        q(keys(B=1, T=3))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [dict(), dict(init="data"), dict(codebook="gradient")])
def test_keys_pass_unquantized_before_start_step(settings):
    q = vq(start_step=5, commit=0.5, **settings)
    k = keys().requires_grad_()
    for step in (0, 4):
        q.set_step(step)
        out = q(k)
        assert q.warming_up and torch.equal(out.quantized, k) and out.loss == 0
        assert out.codes.shape == (3, H, 10)
        q.apply_codebook_statistics()
    assert torch.equal(q.ema_count, torch.ones(H, S, dtype=torch.float64))
    before = q.codebook.detach().clone()
    q.set_step(5)
    assert q.eval().warming_up  # until a batch of training has made the codebook
    out = q.train()(k)
    assert not q.warming_up
    assert not torch.equal(q.codebook, before)
    assert torch.equal(out.quantized, lookup(q.codebook, out.codes))
    assert out.loss > 0


def test_commit_schedule_is_piecewise_linear():
    q = vq(commit=2.0, commit_schedule=[(10, 0.0), (20, 1.0), (40, 0.5)])
    betas = []
    for step in (0, 10, 15, 20, 30, 40, 99):
        q.set_step(step)
        betas.append(q.beta)
    assert betas == pytest.approx([0, 0, 1.0, 2.0, 1.5, 1.0, 1.0])


def test_cosine_lookup_goes_by_angle_and_keeps_the_codes_length():
    q = vq(lookup="cosine")
    q.ema_sum[:, 0] *= 100
    k = keys()
    codes = q(k).codes
    want = torch.cosine_similarity(k[..., None, :], q.codebook[None, :, None], dim=-1).argmax(-1)
    assert torch.equal(codes, want)
    assert (codes == 0).any() and not (codes == 0).all()


def test_autocast_changes_nothing():
    q = vq(torch.float32, commit=0.5)
    k = keys(dtype=torch.float32)
    plain = q(k)
    with torch.autocast("cpu", torch.bfloat16):
        cast = q(k)
    assert torch.equal(plain.codes, cast.codes)
    assert_same({"loss": cast.loss, **cast.metrics}, {"loss": plain.loss, **plain.metrics}, rtol=0.0)


@pytest.mark.parametrize("name", ["rotaton", "nsvq", "exact", "no_such_module:f"])
def test_wrong_estimators_are_one_line_of_config_error(name):
    with pytest.raises(ConfigError, match=f"quantizer.estimator = {name}") as caught:
        vq(estimator=name)
    assert "\n" not in str(caught.value)
