"""Every estimator against the explicit matrix G in fp64: forward bitwise q, backward exactly Gᵀg, row by row."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from transformer_vq.ops import counter, estimators
from transformer_vq.ops.estimators import through
from transformer_vq.ops.estimators.noise import as_noise, named
from transformer_vq.ops.nearest import lookup, nearest_code

K = 6
ROWS = ["ste", "rotation", "rotation_unscaled", "rotation_tangent", "rotation_centred", "scale", "reflection", "diveq"]
SOFT = ["gumbel", "reinmax", "ibq"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def explicit(name: str, k: Tensor, q: Tensor, mean: Tensor | None = None) -> Tensor:
    """G (K, K) of one row, written as in the table of the design, in fp64."""
    if name == "rotation_centred" and mean is not None:
        k, q, name = k - mean, q - mean, "rotation"
    identity = torch.eye(len(k), dtype=torch.float64)
    if name == "ste" or not (k.isfinite().all() and q.isfinite().all()):
        return identity
    if name == "diveq":
        d = (q - k) / (q - k).abs().max()
        return identity - torch.outer(d, d) / (d @ d) if d.isfinite().all() else identity
    if not k.any() or not q.any():
        return identity
    k_bar, q_bar = ((x / x.abs().max()) / (x / x.abs().max()).norm() for x in (k, q))
    ratio = (q.abs().max() / k.abs().max()) * ((q / q.abs().max()).norm() / (k / k.abs().max()).norm())
    if name == "scale":
        return ratio * identity
    if name == "reflection":
        w = k_bar - q_bar
        return ratio * (identity if w.norm() < 1e-15 else identity - 2 * torch.outer(w, w) / (w @ w))
    r = k_bar + q_bar
    if r.norm() < 1e-15:
        return identity
    r = r / r.norm()
    R = identity - 2 * torch.outer(r, r) + 2 * torch.outer(q_bar, k_bar)
    return {
        "rotation": ratio * R,
        "rotation_centred": ratio * R,
        "rotation_unscaled": R,
        "rotation_tangent": ratio * R @ (identity - torch.outer(k_bar, k_bar)),
    }[name]


def jacobian(name: str, k: Tensor, q: Tensor, **given: object) -> Tensor:
    """∂k̂/∂k of every row (N, K, K) by autograd."""
    k = k.clone().requires_grad_()
    k_hat = estimators.apply(name, k, q, **given)
    assert torch.equal(k_hat, q) or not q.isfinite().all()
    rows = [torch.autograd.grad(k_hat[:, i].sum(), k, retain_graph=True)[0] for i in range(k.shape[-1])]
    return torch.stack(rows, 1)


def special_rows() -> tuple[Tensor, Tensor, list[str]]:
    """One batch in which every row is another case."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, K, dtype=torch.float64, generator=generator)
    zero, up = torch.zeros(K, dtype=torch.float64), torch.eye(K, dtype=torch.float64)[0]
    cases = {
        "random": (a, b),
        "parallel": (a, 2.5 * a),
        "equal": (a, a),
        "antipodal": (a, -a),
        "antipodal, longer": (a, -4 * a),
        "antipodal, by a factor that rounds": (a, -1.7 * a),
        "nearly antipodal": (a, -a + 1e-5 * b),
        "nearly parallel": (a, a + 1e-7 * b),
        "orthogonal": (up, torch.eye(K, dtype=torch.float64)[1]),
        "zero key": (zero, b),
        "zero code": (a, zero),
        "both zero": (zero, zero),
        "tiny": (1e-20 * a, 1e-20 * b),
        "huge": (1e20 * a, 1e20 * b),
        "tiny key, huge code": (1e-20 * a, 1e20 * c),
        "huge key, tiny code": (1e20 * a, 1e-20 * c),
        "beyond squares": (1e200 * a, 1e250 * b),
        "below squares": (1e-200 * a, 1e-250 * b),
        "infinite key": (torch.where(up > 0, torch.inf, a), b),
        "NaN in the key": (torch.where(up > 0, torch.nan, a), b),
        "NaN in the code": (a, torch.where(up > 0, torch.nan, b)),
    }
    k, q = (torch.stack(rows) for rows in zip(*cases.values(), strict=True))
    return k, q, list(cases)


@pytest.mark.parametrize("name", ROWS)
def test_jacobian_is_the_explicit_matrix_row_by_row(name):
    k, q, cases = special_rows()
    got = jacobian(name, k, q)
    assert got.isfinite().all()
    for i, case in enumerate(cases):
        tolerance = 1e-9 if case.startswith("nearly") else 1e-13
        assert_same({case: got[i]}, {case: explicit(name, k[i], q[i])}, rtol=tolerance)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_does_not_see_its_neighbours(name):
    k, q, _ = special_rows()
    together = jacobian(name, k, q)
    alone = torch.cat([jacobian(name, k[i : i + 1], q[i : i + 1]) for i in range(len(k))])
    assert_same({"G": together}, {"G": alone}, rtol=1e-14)


def test_centred_rotation_uses_the_mean_of_the_codebook():
    k, q = torch.randn(2, 9, K, dtype=torch.float64)
    codebook = torch.randn(5, K, dtype=torch.float64) + 3
    got = jacobian("rotation_centred", k, q, codebook=codebook)
    want = torch.stack([explicit("rotation_centred", *rows, codebook.mean(0)) for rows in zip(k, q, strict=True)])
    assert_same({"G": got}, {"G": want}, rtol=1e-12)


def test_centred_rotation_is_invariant_to_a_shift_and_rotation_is_not():
    k, q = torch.randn(2, 9, K, dtype=torch.float64)
    codebook, shift = torch.randn(5, K, dtype=torch.float64), torch.randn(K, dtype=torch.float64) * 10
    before, after = (jacobian("rotation_centred", k + s, q + s, codebook=codebook + s) for s in (0, shift))
    assert_same({"G": after}, {"G": before}, rtol=1e-10)
    assert (jacobian("rotation", k + shift, q + shift) - jacobian("rotation", k, q)).abs().max() > 0.1


@pytest.mark.parametrize("name", ROWS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_two_vectors(name, data):
    """Any direction, any size that fp64 holds without its last powers of ten."""
    size = st.floats(-150, 150).map(lambda e: 10.0**e)
    entry = st.floats(-1, 1).map(lambda x: x if abs(x) > 1e-100 else 0.0)  # the oracle's own ratio must not overflow
    vector = st.lists(entry, min_size=3, max_size=3)
    k, q = (torch.tensor([data.draw(vector)], dtype=torch.float64) * data.draw(size) for _ in range(2))
    got = jacobian(name, k, q)
    assert got.isfinite().all()
    want = explicit(name, k[0], q[0])
    unit = [x[0] / x.abs().max().clamp_min(1e-300) for x in (k, q)]
    unit = [x / x.norm().clamp_min(1e-300) for x in unit]
    apart = min(float((unit[0] + unit[1]).norm()), float((unit[0] - unit[1]).norm()))
    if apart > 1e-6:  # nearer, the matrix itself is rounding; orthogonality is tested below
        assert_same({"G": got[0]}, {"G": want}, rtol=1e-8)


@pytest.mark.parametrize("angle", [1e-3, 1e-5, 1e-7, 1e-9, 1e-12])
def test_rotation_stays_orthogonal_beside_antipodal_rows(angle):
    a, b = torch.linalg.qr(torch.randn(K, 2, dtype=torch.float64))[0].T
    k, q = 3 * a[None], -2 * (torch.cos(torch.tensor(angle)) * a + torch.sin(torch.tensor(angle)) * b)[None]
    G = jacobian("rotation_unscaled", k, q)[0]
    assert_same({"GᵀG": G.T @ G}, {"GᵀG": torch.eye(K, dtype=torch.float64)}, rtol=1e-13)
    assert (G @ (k[0] / k.norm()) - q[0] / q.norm()).norm() < 1e-14 / angle + 1e-13
    assert (G - torch.eye(K)).abs().max() > 0.5  # not the fallback


def test_random_rotation_turns_by_the_same_angle_and_repeats():
    k, q = torch.randn(2, 50, K, dtype=torch.float64)
    G = jacobian("random_rotation", k, q, generator=torch.Generator().manual_seed(1))
    again = jacobian("random_rotation", k, q, generator=torch.Generator().manual_seed(1))
    other = jacobian("random_rotation", k, q, generator=torch.Generator().manual_seed(2))
    assert torch.equal(G, again)
    assert (G - other).abs().max() > 0.1
    ratio = q.norm(dim=-1) / k.norm(dim=-1)
    R = G / ratio[:, None, None]
    assert_same({"RᵀR": R.mT @ R}, {"RᵀR": torch.eye(K, dtype=torch.float64).expand(50, K, K)}, rtol=1e-12)
    image = torch.einsum("nij,nj->ni", G, k)
    assert_same(
        {"cos": F.cosine_similarity(image, k), "length": image.norm(dim=-1)},
        {"cos": F.cosine_similarity(q, k), "length": q.norm(dim=-1)},
        rtol=1e-12,
    )
    assert (torch.linalg.det(R) - 1).abs().max() < 1e-10


def quantized_case(dtype=torch.float64, B=2, H=3, T=5, S=7):
    generator = torch.Generator().manual_seed(3)
    k = torch.randn(B, H, T, K, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    codebook = torch.randn(H, S, K, generator=generator, dtype=torch.float64).to(dtype)
    codebook[:, 0, 0] = -0.0
    codebook[:, 1] = -0.0
    codebook.requires_grad_()
    codes = nearest_code(k, codebook)
    codes[0, 0, :2] = torch.tensor([0, 1])
    return k, codebook, codes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*ROWS, "random_rotation", *SOFT])
def test_forward_is_bitwise_the_code(name, dtype):
    k, codebook, codes = quantized_case(dtype)
    q = lookup(codebook, codes)
    k_hat = estimators.apply(name, k, q, codebook, codes, torch.Generator().manual_seed(0))
    assert k_hat.dtype == dtype
    assert torch.equal(k_hat, q)
    assert torch.equal(torch.signbit(k_hat), torch.signbit(q))  # torch.equal takes −0.0 for 0.0
    assert torch.signbit(k_hat).logical_and(k_hat == 0).any()
    k_hat.square().sum().backward()
    assert k.grad.isfinite().all()
    assert k.grad.dtype == dtype


def surrogate(name: str, k: Tensor, codebook: Tensor, codes: Tensor, temperature: float, noise: Tensor | float):
    """The softmax family by ordinary autograd, with its (T, S) matrices."""
    theta = -(k[..., None, :] - codebook[None, :, None]).square().sum(-1) / temperature
    hard = F.one_hot(codes, codebook.shape[1]).to(k.dtype)
    soft = theta.softmax(-1)
    if name == "gumbel":
        soft = (theta + noise / temperature).softmax(-1)
    if name == "reinmax":
        middle = (hard + soft) / 2
        soft = 2 * ((middle.log() - theta).detach() + theta).softmax(-1) - soft / 2
    return torch.einsum("bhts,hsk->bhtk", hard + soft - soft.detach(), codebook)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("name", ["ibq", "reinmax"])
def test_softmax_family_has_the_gradient_of_its_surrogate(name, temperature, monkeypatch):
    monkeypatch.setattr(estimators.soft, "ALIVE", 7 * 16)  # chunks of 16 keys
    k, codebook, codes = quantized_case(T=50)
    weight = torch.randn_like(k)
    got = estimators.apply(name, k, lookup(codebook, codes).detach(), codebook, codes, temperature=temperature)
    want = surrogate(name, k, codebook, codes, temperature, 0.0)
    grads = [torch.autograd.grad((x * weight).sum(), (k, codebook)) for x in (got, want)]
    assert_same({"k": grads[0][0], "C": grads[0][1]}, {"k": grads[1][0], "C": grads[1][1]}, rtol=1e-10)


def test_gumbel_is_ibq_with_noise_that_repeats(monkeypatch):
    k, codebook, codes = quantized_case(B=1, H=1)
    q = lookup(codebook, codes).detach()

    def grad(seed):
        k_hat = estimators.apply("gumbel", k, q, codebook, codes, torch.Generator().manual_seed(seed))
        return torch.autograd.grad(k_hat.square().sum(), k)[0]

    tokens = as_noise(torch.Generator().manual_seed(0), k).tokens
    uniform = counter.uniform(counter.bits(tokens[0, :, None], torch.arange(7))).double()
    want = surrogate("gumbel", k, codebook, codes, 1.0, -(-uniform.log()).log())
    assert_same({"k": grad(0)}, {"k": torch.autograd.grad(want.square().sum(), k)[0]}, rtol=1e-5)  # fp32 noise
    assert torch.equal(grad(0), grad(0)) and not torch.equal(grad(0), grad(1))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_diveq_moves_key_and_codebook_along_the_error(alpha):
    k, codebook, codes = quantized_case()
    weight = torch.randn_like(k)
    got = estimators.apply("diveq", k, lookup(codebook, codes), alpha=alpha)
    error = lookup(codebook, codes) - k
    r = error.norm(dim=-1, keepdim=True) ** alpha
    want = k + r * (error / r).detach()
    grads = [torch.autograd.grad((x * weight).sum(), (k, codebook), allow_unused=True) for x in (got, want)]
    assert_same({"k": grads[0][0]}, {"k": grads[1][0]}, rtol=1e-12)
    if alpha:
        assert_same({"C": grads[0][1]}, {"C": grads[1][1]}, rtol=1e-12)
    else:
        assert not grads[0][1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*ROWS, "random_rotation", *SOFT])
def test_gradients_stay_finite_at_the_ends_of_the_type(name, dtype):
    """Keys, codes and incoming gradients from the smallest to the largest numbers; every mixture of them."""
    largest = torch.finfo(dtype).max
    sizes = torch.tensor([0.0, torch.finfo(dtype).tiny, 1e-3, 1.0, 300.0, 0.99 * largest], dtype=torch.float64)
    grid = torch.cartesian_prod(sizes, sizes, sizes)
    k, q, g = (torch.randn(len(grid), K, dtype=torch.float64).sign() * grid[:, i : i + 1] for i in range(3))
    k, q, g = (x.to(dtype)[None, None] for x in (k, q, g))
    k.requires_grad_()
    codebook = q[0].clone().requires_grad_()
    codes = torch.arange(len(grid))[None, None]
    k_hat = estimators.apply(name, k, lookup(codebook, codes), codebook, codes, torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad(k_hat, k, g)
    assert grad.isfinite().all()


def test_ratio_is_clamped_only_where_the_product_would_overflow():
    k, q = torch.tensor([[1e-18, 0.0]], requires_grad=True), torch.tensor([[0.0, 1e18]])
    k_hat = estimators.apply("rotation", k, q)
    (grad,) = torch.autograd.grad(k_hat, k, torch.tensor([[0.0, 1e4]]), retain_graph=True)
    assert 3.4e38 < grad[0, 0] < torch.inf
    (grad,) = torch.autograd.grad(k_hat, k, torch.tensor([[0.0, 100.0]]))
    assert_same({"g": grad}, {"g": torch.tensor([[1e38, 0.0]])}, rtol=1e-5)


@pytest.mark.parametrize("name", [*ROWS, *SOFT])
def test_geometry_is_wide_under_autocast(name):
    k, codebook, codes = quantized_case(torch.float32)
    q, generators = lookup(codebook, codes).detach(), [torch.Generator().manual_seed(0) for _ in range(2)]
    plain = estimators.apply(name, k, q, codebook, codes, generators[0]).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        cast = estimators.apply(name, k, q, codebook, codes, generators[1])
        assert cast.dtype == torch.float32
        cast = cast.square().sum()
        (inside,) = torch.autograd.grad(cast, k)
    assert torch.equal(inside, torch.autograd.grad(plain, k)[0])


@pytest.mark.parametrize("name", ["rotation", "scale", "diveq"])
def test_threads_do_not_show(monkeypatch, name):
    monkeypatch.setattr(through, "CHUNK", 2**15)
    k = torch.randn(2, 3, 3000, K, requires_grad=True)
    codebook, codes = torch.randn(3, 4, K, requires_grad=True), torch.randint(4, (2, 3, 3000))
    found = []
    for threads in (1, 2):
        monkeypatch.setattr(through, "outer_threads", lambda like, n=threads: n)
        k_hat = estimators.apply(name, k, lookup(codebook, codes), codebook, codes)
        wanted = [k, codebook] if name == "diveq" else [k]  # whose codes learn by it
        found.append(torch.autograd.grad(k_hat.sin().sum(), wanted))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ROWS)
def test_chunks_do_not_show(name):
    k, q = torch.randn(2, 2, 3, 9000, K, dtype=torch.float64)
    k.requires_grad_()
    codebook = torch.randn(3, 4, K, dtype=torch.float64)
    g = torch.randn_like(q)
    (whole,) = torch.autograd.grad(estimators.apply(name, k, q, codebook), k, g)
    parts = [
        torch.autograd.grad(estimators.apply(name, k[:, :, at], q[:, :, at], codebook), k, g[:, :, at])[0][:, :, at]
        for at in (slice(0, 100), slice(100, 9000))
    ]
    assert_same({"k": whole}, {"k": torch.cat(parts, 2)}, rtol=1e-14)


@pytest.mark.parametrize(
    "name",
    [
        *("rotation_centred", "reinmax", "random_rotation", "gumbel"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in (*ROWS, "ibq", "nsvq", "diveq_noise", "sf_diveq")),
    ],
)
def test_compiles_without_graph_breaks(name):
    torch._dynamo.reset()
    k, codebook, codes = quantized_case(torch.float32)
    q, seed = lookup(codebook, codes).detach(), torch.tensor(7)

    def function(k, q, codebook, codes):
        return estimators.apply(name, k, q, codebook, codes, seed)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    k_hat = compiled(k, q, codebook, codes)
    assert torch.equal(k_hat, q) or name in estimators.IMAGE_ONLY
    got, want = (torch.autograd.grad(x.square().sum(), k)[0] for x in (k_hat, function(k, q, codebook, codes)))
    assert_same({"k": got}, {"k": want}, rtol=1e-6)


@pytest.mark.parametrize("name", ["random_rotation", "gumbel", "nsvq", "diveq_noise", "sf_diveq"])
def test_a_seed_repeats_its_noise_and_rows_have_their_own(name):
    k, codebook, codes = quantized_case(torch.float64)
    q = lookup(codebook, codes).detach()

    def grad(k, seed, first_row=0, first_place=0, part=slice(None), places=slice(None)):
        where = torch.tensor(first_row), torch.tensor(first_place)
        cut = (part, slice(None), places)
        noise = named(torch.tensor(seed), *where, k[cut])
        value = estimators.apply(name, k[cut], q[cut], codebook, codes[cut], noise)
        return value, torch.autograd.grad(value.square().sum(), k)[0][cut]

    (whole, a), (again, b), (_, c) = grad(k, 11), grad(k, 11), grad(k, 12)
    assert torch.equal(whole, again) and torch.equal(a, b) and not torch.equal(a, c)
    value, last = grad(k, 11, 1, 2, slice(1, None), slice(2, None))  # a cut within the batch and within the row
    assert_same({"value": value, "k": last}, {"value": whole[1:, :, 2:], "k": a[1:, :, 2:]}, rtol=1e-14)
    bare = estimators.apply(name, k, q, codebook, codes, torch.tensor(11))
    assert torch.equal(bare, whole)


def test_users_own_estimator_is_given_a_generator():
    def shaken(k, q, generator):
        return q + torch.randn(k.shape, generator=generator)

    k, q = torch.randn(2, 4, K)
    estimators.register("shaken", shaken)
    try:
        values = [
            estimators.apply("shaken", k, q, generator=s) for s in (torch.Generator().manual_seed(5), torch.tensor(5))
        ]
    finally:
        del estimators.ESTIMATORS["shaken"]
    assert torch.equal(*values)


def test_users_own_estimator_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_estimators.py").write_text(
        "def halved(k, q, temperature):\n    return q.detach() + 0.5 * temperature * (k - k.detach())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    k, q = torch.randn(2, 4, K)
    k.requires_grad_()
    (grad,) = torch.autograd.grad(estimators.apply("my_estimators:halved", k, q, temperature=3.0).sum(), k)
    assert torch.equal(grad, torch.full_like(k, 1.5))


def test_register_adds_a_name_and_refuses_a_taken_one():
    estimators.register("twice", lambda k, q: q)
    try:
        assert "twice" in estimators.names()
        with pytest.raises(ValueError, match="the name is taken"):
            estimators.register("twice", lambda k, q: q)
    finally:
        del estimators.ESTIMATORS["twice"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(name="rotaton"), "did you mean 'rotation'"),
        (dict(name="ibq"), "needs codebook"),
        (dict(name="random_rotation"), "needs generator"),
        (dict(name="exact"), "second time"),
    ],
)
def test_errors_say_what_is_missing(call, message):
    with pytest.raises(ValueError, match=message):
        estimators.apply(k=torch.ones(2, 3), q=torch.ones(2, 3), **call)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"k \(2, 3\) and q \(3, 3\)"):
        estimators.apply("ste", torch.ones(2, 3), torch.ones(3, 3))


@pytest.mark.parametrize("name", list(estimators.IMAGE_ONLY))
def test_image_only_estimators_are_refused_on_keys_with_the_reason(name):
    with pytest.raises(ValueError, match="images only; it"):
        estimators.check(name)
    estimators.check(name, on_keys=False)


@pytest.mark.parametrize("name", ["nsvq", "diveq_noise"])
def test_noise_estimators_keep_the_length_of_the_error(name):
    k, codebook, codes = quantized_case()
    q = lookup(codebook, codes)
    k_hat = estimators.apply(name, k, q, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(k_hat, q)
    assert_same({"‖k̂−k‖": (k_hat - k).norm(dim=-1)}, {"‖k̂−k‖": (q - k).norm(dim=-1)}, rtol=1e-6)
    k_hat.square().sum().backward()
    assert codebook.grad.abs().sum() > 0


def test_space_filling_points_lie_on_segments_between_neighbours():
    k, codebook, codes = quantized_case()
    q = lookup(codebook, codes)
    k_hat = estimators.apply("sf_diveq", k, q, codebook, generator=torch.Generator().manual_seed(0))
    ends = codebook[:, :-1].detach(), codebook[:, 1:].detach()
    for h in range(3):
        point = k_hat[:, h].detach().reshape(-1, 1, K)
        first, second = (end[h][None] for end in ends)
        through = (point - first).norm(dim=-1) + (point - second).norm(dim=-1) - (first - second).norm(dim=-1)
        assert through.min(-1).values.max() < 1e-9
    k_hat.square().sum().backward()
    assert (codebook.grad.abs().sum(-1) > 0).sum() > 6


def toy_decoder():
    weight = torch.randn(K, 3, dtype=torch.float64, requires_grad=True)
    return weight, lambda x: ((x @ weight).tanh() - 0.3).square().sum()


def test_exact_gives_the_decoder_its_gradient_at_q_and_the_key_its_gradient_at_k():
    weight, loss = toy_decoder()
    k, q = torch.randn(2, 4, K, dtype=torch.float64)
    k.requires_grad_()
    value = estimators.exact(k, q, loss)
    assert_same({"value": value}, {"value": loss(q)}, rtol=1e-15)
    got = torch.autograd.grad(value, (k, weight))
    want = torch.autograd.grad(loss(k), k)[0], torch.autograd.grad(loss(q), weight)[0]
    assert_same({"k": got[0], "W": got[1]}, {"k": want[0], "W": want[1]}, rtol=1e-12)


def test_hessian_extrapolates_the_gradient_from_q_to_k():
    weight, loss = toy_decoder()
    k, q = torch.randn(2, 4, K, dtype=torch.float64)
    k.requires_grad_()
    got = torch.autograd.grad(estimators.hessian(k, q, loss), (k, weight))
    H = torch.autograd.functional.hessian(loss, q).reshape(4 * K, 4 * K)
    at_q = q.clone().requires_grad_()
    g = torch.autograd.grad(loss(at_q), at_q)[0] + (H @ (k.detach() - q).flatten()).view(4, K)
    assert_same({"k": got[0], "W": got[1]}, {"k": g, "W": torch.autograd.grad(loss(q), weight)[0]}, rtol=1e-10)
