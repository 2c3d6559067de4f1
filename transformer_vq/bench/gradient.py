"""Which estimator's gradient is near the true one? Asked at one checkpoint, without the noise of training.

The truth of a key is the gradient of the loss smoothed by noise on that key alone, F_σ (ops/smoothing.py); all other
keys of the layer, and all other layers, stay as they are: evaluation mode, frozen codebooks, the same batch. What an
estimator gives is Gᵀ ∂L/∂k̂ with the ∂L/∂k̂ of backpropagation, which passes later layers by the run's own estimators
and knows nothing of a key in the cache (or, with `gradients: block`, little): that is what training has. With
`through: window` the truth does without it too: beyond the window the key keeps its code, whatever the noise. What an
estimator then misses is its own.

A row of the batch gives one key, drawn at random with its head; rows are independent, and so are the keys. One pass
over a batch of copies finds the loss of a row, in nats summed over its labels, for each code that its key may have.

For N keys with gradients g of an estimator and halves h₁, h₂ of the truth, h their mean:

    cosine  Σ⟨g, h⟩ / √(Σ‖g‖² Σ⟨h₁, h₂⟩)        length  √(Σ‖g‖² / Σ⟨h₁, h₂⟩)

the cosine and ratio of lengths of all these keys' gradients as one vector, as an optimizer sees them. Sums, and not
means of ratios: a key whose gradient is all noise then counts for nothing. Intervals are by bootstrap over rows, 95 %
(agreement.py). Where the noise of the draws drowns the truth, Σ⟨h₁, h₂⟩ ≤ 0, there is no number.

Axes:  B rows, one key each  H heads  T length  K key width  S codes  N draws
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from transformer_vq.bench.agreement import Agreement, Products, agreements
from transformer_vq.bench.doctor import Batch
from transformer_vq.bench.recode import Keys, Progress, choose, chunks, losses, losses_by_code, rows_at_once
from transformer_vq.config import ConfigError
from transformer_vq.models import TransformerVQ
from transformer_vq.ops import estimators
from transformer_vq.ops.smoothing import CodeGradients, code_gradients
from transformer_vq.quantizers import Quantized
from transformer_vq.quantizers.nearest import NearestQuantizer, check_estimator
from transformer_vq.quantizers.probe import KeyProbe
from transformer_vq.quantizers.seeds import seeded

FEWEST_KEYS, FEWEST_DRAWS = 8, 64


@dataclass(frozen=True)
class Plan:
    """What to compare, and how closely."""

    estimators: tuple[str, ...]
    """The first is the one that the others' differences are taken from."""
    sigmas: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Standard deviation of the noise per coordinate, in units of the layer's (`LayerGradients.unit`)."""
    keys: int = 64
    draws: int = 4096
    temperature: float | None = None
    """Of the softmax family; None: the layer's own setting."""
    through: str = "everything"
    """everything | window: whether the truth counts what a key does through the cache."""
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError for what cannot be measured."""
        for name in self.estimators:
            check_estimator(name)
        if self.keys < FEWEST_KEYS:
            raise ConfigError(f"keys = {self.keys}: too few for an interval; at least {FEWEST_KEYS}")
        if self.draws < FEWEST_DRAWS or self.draws % 2:
            raise ConfigError(f"draws = {self.draws}: must be an even number, at least {FEWEST_DRAWS}")
        if not all(0 < sigma < float("inf") for sigma in self.sigmas):
            raise ConfigError(f"sigma = {', '.join(map(str, self.sigmas))}: each must be a positive number")
        if self.through not in ("everything", "window"):
            raise ConfigError(f"through = {self.through}: must be everything or window")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature = {self.temperature}: must be a positive number")


@dataclass(frozen=True)
class Truth:
    """The smoothed gradient of a layer at one width of the noise."""

    sigma: float
    """In units of the layer."""
    moved: float
    """Mean share of draws that change the key's code."""
    resolved: float
    """Σ⟨h₁, h₂⟩ / Σ‖h‖²: 1 without noise of the draws, 0 where all is noise."""
    length: float
    """√Σ⟨h₁, h₂⟩, in nats per unit of key; NaN where it is not resolved."""


@dataclass(frozen=True)
class LayerGradients:
    """What was found about one layer."""

    layer: int
    estimator: str
    """The run's own."""
    unit: float
    """What sigma = 1 stands for: root mean square of ‖k − q‖, over all keys of the batch."""
    angle: list[float]
    """Of each key and its code, degrees."""
    ratio: list[float]
    """‖q‖/‖k‖ of each key."""
    truths: list[Truth]
    agreements: list[Agreement]


class Given(NamedTuple):
    """What a layer's chosen keys have, and what each estimator gives them."""

    k: Tensor
    """(B, K)."""
    q: Tensor
    """(B, K)."""
    slopes: list[Tensor]
    """(B, K) by estimator."""
    error: Tensor
    """Mean of ‖k − q‖², over all keys of the batch."""


def compare(model: TransformerVQ, batch: Batch, plan: Plan, progress: Progress | None = None) -> list[LayerGradients]:
    """Compare estimators in every layer with a nearest-row quantizer (vq, simvq), at a key of each row of the batch.

    The model is left as it was. progress(done, total) counts calls of it. Raises ConfigError for a plan that cannot be
    measured, and where no layer quantizes in such a way.
    """
    plan.check()
    model = copy.deepcopy(model).eval()
    layers = comparable(model)
    if len(batch.tokens) != plan.keys:
        raise ValueError(f"a batch of {len(batch.tokens)} rows for keys = {plan.keys}: as many are needed")
    keys = choose(model, batch, plan.seed)
    given = backward(model, layers, batch, keys, plan)
    found = []
    for number, (layer, quantizer) in enumerate(layers.items()):
        told = _part(progress, number, len(layers))
        found.append(_layer(model, layer, quantizer, batch, keys, given[layer], plan, told))
    return found


def comparable(model: TransformerVQ) -> dict[int, NearestQuantizer]:
    """The layers whose keys an estimator of the table stands before.  Raises ConfigError where there is none."""
    if model.config.window_keys == "exact":
        raise ConfigError(
            "model.window_keys = exact: keys have their gradient without an estimator; nothing to compare"
        )
    found = {
        i: quantizer
        for i, quantizer in enumerate(model.quantizers)
        if isinstance(quantizer, NearestQuantizer) and not quantizer.warming_up
    }
    if not found:
        kinds = ", ".join(dict.fromkeys(settings.kind for settings in model.config.layer_quantizers()))
        raise ConfigError(f"--gradient: no layer has a vq or simvq quantizer that has started; they are: {kinds}")
    return found


def backward(
    model: TransformerVQ, layers: dict[int, NearestQuantizer], batch: Batch, keys: Keys, plan: Plan
) -> dict[int, Given]:
    """One backward pass for all layers and estimators, some rows at a time."""
    parts: dict[int, list[Given]] = {i: [] for i in layers}
    with KeyProbe(layers) as probe:
        for rows in chunks(len(batch.tokens), rows_at_once(model, batch.tokens.shape[1])):
            nats = losses(model, batch, rows).sum()
            arrived = torch.autograd.grad(nats, [probe.results[i].quantized for i in layers], materialize_grads=True)
            for (i, quantizer), g in zip(layers.items(), arrived, strict=True):
                k, result = probe.keys[i].detach(), probe.results[i]
                q = result.quantized.detach()
                at = (torch.arange(len(q), device=q.device), keys.heads[rows], keys.places[rows])
                slopes = [_slope(name, quantizer, k, q, result, g, plan)[at] for name in plan.estimators]
                parts[i].append(Given(k[at], q[at], slopes, (k - q).double().square().sum(-1).mean()))
    return {
        i: Given(
            torch.cat([part.k for part in found]),
            torch.cat([part.q for part in found]),
            [torch.cat(slopes) for slopes in zip(*(part.slopes for part in found), strict=True)],
            torch.stack([part.error * len(part.k) for part in found]).sum() / len(batch.tokens),
        )
        for i, found in parts.items()
    }


def _slope(
    name: str, quantizer: NearestQuantizer, k: Tensor, q: Tensor, result: Quantized, g: Tensor, plan: Plan
) -> Tensor:
    """What the estimator makes of the gradient g at the quantized keys, (B, H, T, K)."""
    k, config = k.clone().requires_grad_(), quantizer.config
    noise = quantizer.names(k, None) if estimators.draws(name) else None
    temperature = plan.temperature or config.temperature
    codebook = quantizer.codebook.detach()
    k_hat = estimators.apply(name, k, q, codebook, result.codes, noise, temperature, config.alpha)
    (slope,) = torch.autograd.grad(k_hat, k, g)
    return slope


def _layer(
    model: TransformerVQ,
    layer: int,
    quantizer: NearestQuantizer,
    batch: Batch,
    keys: Keys,
    given: Given,
    plan: Plan,
    progress: Progress | None,
) -> LayerGradients:
    """The truth of every key by every width of noise, and what the estimators' gradients have in common with it."""
    unit = given.error.sqrt().item()
    if not 0 < unit < float("inf"):
        raise ConfigError(f"--gradient: layer {layer} has keys that are their codes, or not finite: no width for noise")
    moves = [code_moves(quantizer, layer, given.k, keys, sigma * unit, plan) for sigma in plan.sigmas]
    visited = torch.stack([torch.stack([move.share for move in by_key]) for by_key in moves])  # (widths, B, S)
    own = own_codes(quantizer, given.k, keys)[:, None]
    wanted = (visited > 0).any(0).scatter(1, own, True)
    nats = losses_by_code(model, layer, batch, keys, wanted, plan.through, progress)
    nats = nats - nats.gather(1, own)  # a constant, which drops out; smaller numbers keep their digits
    products, truths = [], []
    for sigma, by_key, shares in zip(plan.sigmas, moves, visited, strict=True):
        first = torch.stack([f @ move.first.double() for f, move in zip(nats, by_key, strict=True)])
        second = torch.stack([f @ move.second.double() for f, move in zip(nats, by_key, strict=True)])
        hh, mean = (first * second).sum(-1), (first + second) / 2
        slopes = torch.stack(given.slopes).double()  # (estimators, B, K)
        gg, gh = slopes.square().sum(-1), (slopes * mean).sum(-1)
        products.append(Products(gg.cpu().numpy(), gh.cpu().numpy(), hh.cpu().numpy()))
        total, noisy = hh.sum().item(), mean.square().sum().item()
        moved = 1 - shares.gather(1, own).mean().item()
        length = total**0.5 if total > 0 else float("nan")
        truths.append(Truth(sigma, moved, total / noisy if noisy else float("nan"), length))
    angle = torch.rad2deg(F.cosine_similarity(given.k, given.q, dim=-1).clamp(-1, 1).acos()).tolist()
    ratio = (given.q.norm(dim=-1) / given.k.norm(dim=-1)).tolist()
    found = agreements(plan.estimators, plan.sigmas, products, {"angle": angle, "ratio": ratio}, plan.seed)
    return LayerGradients(layer, quantizer.config.estimator, unit, angle, ratio, truths, found)


def code_moves(
    quantizer: NearestQuantizer, layer: int, k: Tensor, keys: Keys, sigma: float, plan: Plan
) -> list[CodeGradients]:
    """How each key's codes move with it; k (B, K). Every width of noise sees the same draws."""
    codebook, found = quantizer.codebook.detach().to(k.dtype), []
    for row, head in enumerate(keys.heads.tolist()):
        generator = seeded(plan.seed, layer, f"noise on key {row}")
        noise = torch.randn(plan.draws, k.shape[1], generator=generator).to(k)
        found.append(code_gradients(k[row], codebook[head], noise, sigma, quantizer.metric))
    return found


def own_codes(quantizer: NearestQuantizer, k: Tensor, keys: Keys) -> Tensor:
    """The codes (B) of the chosen keys (B, K)."""
    H = quantizer.codebook.shape[0]
    codes = quantizer.find(k[None, None].expand(1, H, -1, -1))[0]
    return codes[keys.heads, torch.arange(len(k), device=k.device)]


def _part(progress: Progress | None, number: int, count: int) -> Progress | None:
    """Progress of one of `count` equal parts."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, count * total)
