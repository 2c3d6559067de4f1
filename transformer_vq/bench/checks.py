"""What the self-check finds about one layer's quantizer from the batches that it saw (doctor.py runs them).

Each check ends green, amber or red with one line of advice; `none` where it does not apply. What is checked:

    forward         quantized keys are rows of the codebook, bit for bit
    gradient        the keys' gradient is Gᵀg, against the plain definitions of `oracle.py` and `expected.py`
    moves           a training step moves the codebook
    usage           share of codes taken in these batches; perplexity beside it
    dead_codes      share of codes whose running count is below 1
    norm_ratio      mean ‖q‖/‖k‖, by which `rotation` and its relatives multiply the task gradient
    cosine          mean cos(k, q)
    key_rank        effective rank of the keys, exp(entropy of the singular values)  [Roy & Vetterli 2007]
    code_rank       the same of the codebook
    task_share      ‖∂ task loss/∂k‖ over ‖∂ quantizer's own loss/∂k‖: below 1 the commitment term wins  [Su Jianlin]
    bf16_codes      share of bf16 keys that get, under bf16 autocast, the code that fp32 and fp64 choose

Axes:  B batch  H heads  T length  K key width  S codes  N keys
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from transformer_vq.bench import expected
from transformer_vq.quantizers import Quantized, Quantizer
from transformer_vq.quantizers.health import effective_rank
from transformer_vq.quantizers.nearest import NearestQuantizer

SCALED_BY_RATIO = ("rotation", "rotation_tangent", "rotation_centred", "scale", "reflection", "random_rotation")
ROWS = 32  # keys held against explicit matrices; each costs a K×K matrix in fp64
GRADIENT_TOLERANCE = 1e-4  # relative; the fast forms run in fp32


@dataclass(frozen=True)
class Check:
    """One finding about one layer."""

    name: str
    status: str
    """green | amber | red | none (does not apply)."""
    value: float | None
    advice: str


class Seen(NamedTuple):
    """One layer's quantizer in one batch."""

    k: Tensor
    result: Quantized
    codebook: Tensor
    task_gradient: Tensor
    own_gradient: Tensor


def examine(quantizer: Quantizer, estimator: str | None, seen: Sequence[Seen], change: float) -> list[Check]:
    """Every check of one quantizing layer."""
    k = torch.cat([rearrange(s.k, "b h t k -> h (b t) k") for s in seen], 1)
    codes = torch.cat([rearrange(s.result.codes, "b h t -> h (b t)") for s in seen], 1)
    codebook = seen[-1].codebook
    cure = "init: kmeans" if quantizer_kind(quantizer) == "vq" else "expansion: mlp, or more training"
    lengths = torch.stack([s.result.quantized.detach().norm(dim=-1) / s.k.norm(dim=-1) for s in seen])
    cosines = torch.stack([nn.functional.cosine_similarity(s.k, s.result.quantized.detach(), dim=-1) for s in seen])
    dead = seen[-1].result.metrics.get("dead_codes")
    return [
        check_forward(seen),
        check_gradient(quantizer, estimator, seen[0].k),
        check_moves(change),
        check_usage(codes, codebook.shape[1]),
        check_dead(None if dead is None else dead.item(), codebook.shape[1]),
        check_ratio(lengths.mean().item(), estimator, cure),
        check_cosine(cosines.mean().item(), cure),
        check_rank("key_rank", k, "lower commit or the learning rate"),
        check_rank("code_rank", codebook, cure),
        check_task_share(seen),
        check_bf16(quantizer, seen[0].k),
    ]


def grade(value: float, amber: float, red: float) -> str:
    """Green at or above `amber`, red below `red`; NaN is red."""
    return "green" if value >= amber else "amber" if value >= red else "red"


def check_forward(seen: Sequence[Seen]) -> Check:
    """Quantized keys are rows of the codebook, bit for bit."""
    share = min(_equal_rows(s) for s in seen)
    advice = "" if share == 1 else "the quantizer's forward value is not a code: attention over its cache is wrong"
    return Check("forward", "green" if share == 1 else "red", share, advice)


def _equal_rows(s: Seen) -> float:
    rows = torch.stack([c[z] for c, z in zip(s.codebook, s.result.codes.transpose(0, 1), strict=True)], 1)
    return (rows.to(s.k.dtype) == s.result.quantized.detach()).all(-1).double().mean().item()


def check_gradient(quantizer: Quantizer, estimator: str | None, k: Tensor) -> Check:
    """The gradient that reaches the keys is Gᵀg, for the first `ROWS` keys and a random g."""
    k = k[:1, :, :ROWS].clone().requires_grad_()
    result = quantizer(k)
    quantizer.discard_codebook_statistics()
    g = torch.randn(k.shape, generator=torch.Generator().manual_seed(0)).to(k)
    if not result.quantized.requires_grad:
        return Check("gradient", "red", 0.0, "no gradient reaches the keys")
    (got,) = torch.autograd.grad(result.quantized, k, g, retain_graph=True)
    if not torch.isfinite(got).all():
        return Check("gradient", "red", None, "the keys' gradient is not finite")
    want = expected.key_gradient(quantizer, k, result, g)
    if want is not None:
        # Of a key that all but equals its code the direction between them is rounding: nothing there to compare.
        apart = (k - result.quantized).detach().norm(dim=-1) > 1e-3 * k.detach().norm(dim=-1)
        error = ((got - want)[apart].norm() / want[apart].norm().clamp_min(1e-30)).item()
    elif isinstance(quantizer, NearestQuantizer) and estimator in expected.RANDOM:
        error = expected.shape_error(estimator, k, result.quantized)
    elif not got.any():
        return Check("gradient", "red", 0.0, "the keys' gradient is zero")
    else:
        return Check("gradient", "none", None, "finite and not zero; no definition of it is known here")
    good = error <= GRADIENT_TOLERANCE
    name = estimator or "straight-through estimator"
    advice = "" if good else f"the gradient is not the {name}'s by its definition: relative error {error:.1e}"
    return Check("gradient", "green" if good else "red", error, advice)


def quantizer_kind(quantizer: Quantizer) -> str:
    """The `kind` of the quantizer's settings; custom classes may have none."""
    return str(getattr(getattr(quantizer, "config", None), "kind", "custom"))


def check_moves(change: float) -> Check:
    """One training step moved the codebook."""
    advice = (
        "" if change > 0 else "the codebook gets neither statistics nor gradient: check codebook, ema and start_step"
    )
    return Check("moves", "green" if change > 0 else "red", change, advice)


def check_usage(codes: Tensor, S: int) -> Check:
    """Codes taken by the keys of all batches, (H, N) int64."""
    counts = torch.stack([torch.bincount(row, minlength=S) for row in codes]).double()
    share = (counts > 0).double().mean().item()
    p = counts / counts.sum(-1, keepdim=True)
    perplexity = torch.special.entr(p).sum(-1).exp().mean().item()
    if codes.shape[1] < 4 * S:
        return Check("usage", "none", share, f"too few keys to tell: {codes.shape[1]} for {S} codes")
    status = grade(share, 0.5, 0.1)
    advice = f"{share:.0%} of the codes are used, perplexity {perplexity:.0f} of {S}"
    return Check(
        "usage",
        status,
        share,
        "" if status == "green" else f"{advice}: init: kmeans, dead_code_threshold, or fewer codes",
    )


def check_dead(dead: float | None, S: int) -> Check:
    """Codes whose running count is below 1."""
    if dead is None:
        return Check("dead_codes", "none", None, "this kind keeps no running counts")
    status = grade(1 - dead / S, 0.5, 0.1)
    return Check(
        "dead_codes", status, dead / S, "" if status == "green" else "set dead_code_threshold, or init: kmeans"
    )


def check_ratio(value: float, estimator: str | None, cure: str) -> Check:
    """‖q‖/‖k‖ near 1."""
    status = grade(min(value, 1 / value) if value > 0 else 0.0, 0.5, 0.05)
    if status == "green":
        return Check("norm_ratio", status, value, "")
    effect = (
        f"{estimator} multiplies the task gradient by it: {cure}, retune commit, or take rotation_unscaled"
        if estimator in SCALED_BY_RATIO
        else f"codes and keys differ in length: {cure}"
    )
    return Check("norm_ratio", status, value, effect)


def check_cosine(value: float, cure: str) -> Check:
    """Keys and their codes point the same way."""
    status = grade(value, 0.5, 0.0)
    return Check("cosine", status, value, "" if status == "green" else f"codes point away from their keys: {cure}")


def check_rank(name: str, rows: Tensor, advice: str) -> Check:
    """Effective rank of (H, N, K), mean over heads, against the largest possible."""
    wide = rows.double()
    rank = effective_rank(wide.mT @ wide).item()
    possible = min(rows.shape[1:])
    status = "green" if possible == 1 else grade(rank / possible, 0.25, 1.5 / possible)
    return Check(name, status, rank, "" if status == "green" else f"effective rank {rank:.1f} of {possible}; {advice}")


def check_task_share(seen: Sequence[Seen]) -> Check:
    """Size of the task gradient at the keys over that of the quantizer's own loss."""
    task = sum(s.task_gradient.double().square().sum().item() for s in seen) ** 0.5
    own = sum(s.own_gradient.double().square().sum().item() for s in seen) ** 0.5
    if own == 0:
        return Check("task_share", "none", None, "no commitment loss pulls at the keys")
    status = grade(task / own, 1.0, 0.1)
    return Check(
        "task_share",
        status,
        task / own,
        "" if status == "green" else "commitment outweighs the task at the keys: lower commit",
    )


def check_bf16(quantizer: Quantizer, k: Tensor) -> Check:
    """Keys rounded to bf16, quantized under bf16 autocast, get the codes of the same numbers in fp32.

    Where codes are the nearest rows, both are held against an fp64 search; codes that tie to 1e-5 count as the same.
    """
    rounded = k.bfloat16()
    with torch.no_grad():
        want = quantizer(rounded.float()).codes
        with torch.autocast(k.device.type, torch.bfloat16):
            got = quantizer(rounded).codes
        same = got == want
        if quantizer_kind(quantizer) in ("vq", "simvq"):
            keys, codebook = rounded.double(), quantizer.codebook.double()
            if getattr(quantizer.config, "lookup", "euclidean") == "cosine":
                keys, codebook = (nn.functional.normalize(x, dim=-1) for x in (keys, codebook))
            distances = torch.cdist(keys, codebook[None])  # (B, H, T, S)
            nearest, size = distances.amin(-1), keys.norm(dim=-1) + codebook.norm(dim=-1).amax()
            for codes in (got, want):
                same &= distances.gather(-1, codes[..., None])[..., 0] <= nearest + 1e-5 * size
    quantizer.discard_codebook_statistics()
    share = same.double().mean().item()
    good = share == 1
    advice = "" if good else "distances are computed in bf16, which picks other codes: compute them in fp32"
    return Check("bf16_codes", "green" if good else "red", share, advice)
