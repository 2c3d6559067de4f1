"""Settings of one layer's key quantizer: one class a kind, chosen by the field `kind`.

`codes` is S, the number of codebook rows per key head. `commit` is β everywhere: it weighs the squared distance
*summed* over heads and width and *averaged* over batch and time (Lingle 2309.16354), not the per-dimension mean of most
VQ-VAE code.
"""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter, field_validator, model_validator

from transformer_vq.config.base import Settings


class KeyQuantizer(Settings):
    """What every kind that has a codebook shares."""

    commit: float = Field(
        1e-4, ge=0, description="β, weight of the commitment loss: sum over heads and width, mean over batch and time"
    )
    commit_schedule: list[Annotated[tuple[int, float], Field(strict=False)]] | None = Field(
        None,
        description="factor on β by optimizer step as [[step, factor], ...], linear between, constant outside; null: 1",
    )
    start_step: int = Field(
        0,
        ge=0,
        description="keys pass unquantized before this step; the codebook of vq is then made from that step's keys "
        "(init: data: some of them; else by kmeans), as with init",
    )

    @field_validator("commit_schedule")
    @classmethod
    def _increasing(cls, value: list[tuple[int, float]] | None) -> list[tuple[int, float]] | None:
        if value is not None:
            steps = [step for step, _ in value]
            if not steps or steps[0] < 0 or any(b <= a for a, b in itertools.pairwise(steps)):
                raise ValueError("steps must be non-negative and increase, like [[0, 0.0], [1000, 1.0]]")
            if any(factor < 0 for _, factor in value):
                raise ValueError("factors must not be negative")
        return value

    @property
    def size(self) -> int:
        """S, the number of codes per key head."""
        raise NotImplementedError


class Estimated(KeyQuantizer):
    """Kinds whose gradient estimator is selectable."""

    estimator: str = Field(
        "ste", min_length=1, description="how the gradient passes the quantization: a name or module:function"
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="of the softmax over -distance²: gumbel, reinmax, ibq, and the diversity and entropy losses",
    )
    alpha: float = Field(
        1.0, ge=0, description="of diveq: share of the error's direction that goes to the codebook; 0 is ste"
    )


class VQConfig(Estimated):
    """Nearest row of a learned codebook  [van den Oord 1711.00937; EMA as in Lingle 2309.16354]."""

    kind: Literal["vq"] = "vq"
    codes: int = Field(512, ge=1, description="codebook rows per key head (S)")
    lookup: Literal["euclidean", "cosine"] = Field("euclidean", description="what `nearest` means")
    init: Literal["normal", "kmeans", "data"] = Field(
        "normal",
        description="normal: the paper's; kmeans or data: from the keys of the first step, all micro-batches and "
        "processes (of more than 64 a code, or one a code with data, those that a hash of seed, step, row and place "
        "puts first)",
    )
    codebook: Literal["ema", "gradient"] = Field("ema", description="what moves the codebook")
    ema: float = Field(0.99, ge=0, lt=1, description="γ, share of the old statistics kept at each optimizer step")
    codebook_weight: float = Field(
        1.0, ge=0, description="codebook: gradient only; weight of ‖sg[k] - c‖², same sum and mean as commit"
    )
    dead_code_threshold: float = Field(
        0.0,
        ge=0,
        description="codes whose running count falls below it are replaced by random keys, once a code has had its "
        "time, the count's memory of 1/(1-ema) steps, at least 10; 0: never",
    )
    orthogonality_weight: float = Field(0.0, ge=0, description="weight of the codebook's orthogonality loss (gradient)")
    diversity_weight: float = Field(0.0, ge=0, description="weight of the negative entropy of the mean soft assignment")
    wasserstein_weight: float = Field(
        0.0, ge=0, description="weight of the distribution-matching loss on the codebook (2506.15078; gradient)"
    )

    @property
    def size(self) -> int:
        return self.codes

    @model_validator(mode="after")
    def _codebook_losses_need_gradient(self) -> VQConfig:
        for name in ("orthogonality_weight", "wasserstein_weight"):
            if self.codebook == "ema" and getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}: needs codebook: gradient, an EMA codebook gets none")
        if self.codebook == "ema" and self.estimator in ("gumbel", "reinmax", "ibq"):
            raise ValueError(f"estimator = {self.estimator}: needs codebook: gradient, it hands gradients to the codes")
        return self


class SimVQConfig(Estimated):
    """Frozen random codebook times a learned linear map  [Zhu 2411.02038]."""

    kind: Literal["simvq"] = "simvq"
    codes: int = Field(512, ge=1, description="codebook rows per key head (S)")
    codebook_weight: float = Field(1.0, ge=0, description="weight of ‖sg[k] - c‖², same sum and mean as commit")

    @property
    def size(self) -> int:
        return self.codes


class FSQConfig(KeyQuantizer):
    """Finite scalar quantization  [Mentzer 2309.15505]: project K -> len(levels), round, expand to K."""

    kind: Literal["fsq"] = "fsq"
    levels: list[Annotated[int, Field(ge=2)]] = Field(
        [8, 4, 4],
        strict=False,
        min_length=1,
        description="levels of each rounded dimension; their product is the number of codes",
    )
    codes: int | None = Field(None, ge=1, description="optional; must equal the product of levels")
    expansion: Literal["linear", "mlp"] = Field(
        "linear", description="from len(levels) back to K; linear gives keys of rank len(levels)"
    )
    commit: float = Field(0.0, ge=0, description="β; FSQ needs none (its paper), so 0 is the default")

    @property
    def size(self) -> int:
        return math.prod(self.levels)

    @model_validator(mode="after")
    def _codes_are_the_product(self) -> FSQConfig:
        if self.codes is not None and self.codes != self.size:
            raise ValueError(f"codes = {self.codes}: must equal the product of levels {self.levels}, {self.size}")
        return self


class IFSQConfig(FSQConfig):
    """`fsq` with 2σ(1.6x) - 1 in place of tanh  [2601.17124]."""

    kind: Literal["ifsq"] = "ifsq"  # type: ignore[assignment]  # narrows the parent's literal to its own tag


class SignConfig(Estimated):
    """What the two sign quantizers share: 2^bits codes."""

    bits: int = Field(9, ge=1, le=20, description="binary dimensions; the number of codes is 2^bits")
    codes: int | None = Field(None, ge=1, description="optional; must equal 2^bits")
    expansion: Literal["linear", "mlp"] = Field("linear", description="from bits back to K")
    entropy_weight: float = Field(
        0.0, ge=0, description="weight of E[H(code)] - H(E[code]): sure about each key, spread over all"
    )
    commit: float = Field(0.0, ge=0, description="β of the distance between the projected key and its signs")

    @property
    def size(self) -> int:
        return 1 << self.bits

    @model_validator(mode="after")
    def _codes_are_the_power(self) -> SignConfig:
        if self.codes is not None and self.codes != self.size:
            raise ValueError(f"codes = {self.codes}: must equal 2^bits = {self.size}")
        return self


class LFQConfig(SignConfig):
    """Lookup-free quantization: signs  [Yu 2310.05737]."""

    kind: Literal["lfq"] = "lfq"


class BSQConfig(SignConfig):
    """Binary spherical quantization: signs of a unit vector, over √bits  [Zhao 2406.07548]."""

    kind: Literal["bsq"] = "bsq"


class NoneConfig(Settings):
    """No quantization: full softmax attention on the keys themselves, the baseline. Quadratic in T."""

    kind: Literal["none"] = "none"


class CustomConfig(Settings):
    """The user's own quantizer class, named `module:Class`; `options` are handed to it as keywords."""

    kind: str = Field(pattern=r"^[\w.]+:\w+$", description="module:Class, importable from the working folder")
    codes: int = Field(ge=1, description="codebook rows per key head (S)")
    options: dict[str, Any] = Field({}, description="keywords for the class")

    @property
    def size(self) -> int:
        return self.codes


def _kind_of(value: Any) -> str | None:
    """The tag of the union: the kind, or `custom` for a `module:Class`; a block without `kind` is `vq`."""
    kind = value.get("kind", "vq") if isinstance(value, dict) else getattr(value, "kind", None)
    return "custom" if isinstance(kind, str) and ":" in kind else kind


QuantizerConfig = Annotated[
    Annotated[VQConfig, Tag("vq")]
    | Annotated[SimVQConfig, Tag("simvq")]
    | Annotated[FSQConfig, Tag("fsq")]
    | Annotated[IFSQConfig, Tag("ifsq")]
    | Annotated[LFQConfig, Tag("lfq")]
    | Annotated[BSQConfig, Tag("bsq")]
    | Annotated[NoneConfig, Tag("none")]
    | Annotated[CustomConfig, Tag("custom")],
    Discriminator(_kind_of),
]

QUANTIZER: TypeAdapter[Any] = TypeAdapter(QuantizerConfig)
QUANTIZERS = (VQConfig, SimVQConfig, FSQConfig, IFSQConfig, LFQConfig, BSQConfig, NoneConfig, CustomConfig)
