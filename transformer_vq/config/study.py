"""Settings of a study: one question, asked by many runs that differ in what the factors name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from transformer_vq.config.base import Settings

VARIANT = "variant"  # the factor whose levels set several keys at once
Seeds = list[Annotated[int, Field(ge=0, lt=2**63)]]
Levels = list[Any] | dict[str, Any]


class RandomDesign(Settings):
    """A random subset of the grid."""

    kind: Literal["random"] = "random"
    n: int = Field(ge=1, description="combinations drawn, beside those that they are compared with")
    seed: int = Field(0, ge=0, description="of the draw")


class Budget(Settings):
    """What every run may spend; it sets `train.steps`."""

    tokens: int | None = Field(None, ge=1, description="training tokens of a run")
    flops: float | Literal["baseline"] | None = Field(
        None, description="training FLOPs of a run, forward and backward; baseline: what the baseline spends"
    )

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if (self.tokens is None) == (self.flops is None):
            raise ValueError("name one of tokens and flops")
        return self


class Primary(Settings):
    """The one comparison that is fixed before anything runs; all others are exploratory."""

    levels: dict[str, Any] = Field(
        min_length=1, description="factor: level, against the same combination with the baseline's levels"
    )
    metric: str | None = Field(None, description="one of `metrics`; null: the first")


class GateConfig(Settings):
    """A comparison that must hold before the other arms run."""

    better: str = Field(min_length=1, description="the arm that must be better")
    than: str = Field(min_length=1, description="the arm that it must be better than")
    by: float = Field(
        ge=0, allow_inf_nan=False, description="at least so much, as the mean of paired differences over seeds"
    )
    metric: str | None = Field(None, description="one of `metrics`; null: the main one")


class EmergenceConfig(Settings):
    """Where seeds learn or do not: when they do, instead of a mean of both kinds."""

    metric: str = Field(min_length=1, description="of the evaluations during training, like accuracy")
    at: float = Field(
        allow_inf_nan=False, description="a run emerges at its first evaluation with a value this good or better"
    )
    better: Literal["min", "max"] | None = Field(None, description="null: as in `metrics`, max where it is not there")


class BranchConfig(Settings):
    """One base a seed is trained first, and every arm goes on from it."""

    model_config = ConfigDict(serialize_by_alias=True)

    settings: dict[str, Any] = Field(
        {}, alias="from", description="dotted.key: value, what the base has beside the study's overrides"
    )
    steps: int = Field(ge=1, description="train.steps of the base; those of the arms count from there")


class EngineConfig(Settings):
    """Options handed on to an engine as they are."""

    submitit: dict[str, Any] = Field({}, description="parameters of its executor, like slurm_partition, timeout_min")
    ray: dict[str, Any] = Field({}, description="keywords of ray.init, like address; num_cpus, num_gpus: of a run")


class FigureConfig(Settings):
    """A line plot beside the standard figures: one point an arm, mean and interval over seeds."""

    x: str = Field(
        description="a numeric factor | a path in summary.json | codes: of the first layer | state: numbers in the "
        "state of one stream, at train.seq_len"
    )
    y: str = Field(
        description="a path in summary.json, like test/accuracy; with a * in it, like test/distance*/accuracy, every "
        "arm is a line over the numbers that stand there, and x is only a label"
    )
    series: str | dict[str, list[str]] | None = Field(
        None, description="the factor whose levels are lines | {line: [arms]} | null: all factors but x"
    )
    log_x: bool = Field(False, description="logarithmic x axis")


class StudyConfig(Settings):
    """A study, the whole YAML file."""

    question: str | None = Field(
        None, min_length=1, description="what the study asks, one sentence for the report's title; null: a plain title"
    )
    notes: str | None = Field(None, description="text for the report: why these levels, what was expected")
    base: str = Field(min_length=1, description="CONFIG that every run starts from: a file, recipe or run folder")
    run_dir: str = Field(min_length=1, description="the one folder that the study writes to")
    overrides: dict[str, Any] = Field({}, description="dotted.key: value, for every run")
    factors: dict[str, Levels] = Field(
        {}, description="dotted.key: the values it takes; {name: value} gives them names of their own"
    )
    variants: dict[str, dict[str, Any]] = Field(
        {}, description=f"name: {{dotted.key: value}}; one more factor, `{VARIANT}`, whose levels set several keys"
    )
    design: Literal["grid", "one_at_a_time", "leave_one_layer_in", "leave_one_layer_out"] | RandomDesign = Field(
        "grid", description="which combinations of levels are run; {kind: random, n: N, seed: S}: a subset of the grid"
    )
    seeds: Seeds = Field(min_length=1, description="each combination is run with each; comparisons pair them")
    budget: Budget | None = Field(None, description="null: train.steps of the base")
    metrics: dict[str, Literal["min", "max"]] = Field(
        {"bits_per_byte": "min"}, min_length=1, description="names in summary.json's splits, and which way is better"
    )
    split: str = Field("test", min_length=1, description="split of summary.json that comparisons read")
    tune_split: str = Field("valid", min_length=1, description="split on which `tune` chooses")
    baseline: dict[str, Any] = Field(
        {}, description="factor: level; each arm is compared with itself at these levels; {}: every first level"
    )
    against: dict[str, str] = Field({}, description="arm: the arm it is compared with, instead of what baseline says")
    primary: Primary | None = Field(None, description="null: every comparison is exploratory")
    equivalence: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="δ: a difference whose 95 % interval lies inside ±δ is called equivalent",
    )
    tune: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, description="dotted.key: values; every arm gets the same grid and keeps its best"
    )
    tune_seeds: Seeds = Field([], description="seeds of the tuning runs, none of them in `seeds`")
    gate: GateConfig | None = Field(
        None, description="{better: arm, than: arm, by: size}: runs first; where it does not hold, the study ends there"
    )
    emergence: EmergenceConfig | None = Field(
        None, description="{metric: accuracy, at: 0.9}: report when runs get there, beside the means"
    )
    branch: BranchConfig | None = Field(
        None, description="{from: {key: value}, steps: N}: a base a seed, from which all arms go on; null: from scratch"
    )
    figures: list[FigureConfig] = Field([], description="line plots beside the standard figures")
    engine: EngineConfig = EngineConfig()

    @field_validator("factors")
    @classmethod
    def _not_empty(cls, value: dict[str, Levels]) -> dict[str, Levels]:
        for key, levels in value.items():
            if not levels:
                raise ValueError(f"{key} = {levels}: an empty grid; give at least one value")
            if key == VARIANT:
                raise ValueError(f"{VARIANT}: is the name of the factor that `variants` makes")
        return value

    @field_validator("seeds", "tune_seeds")
    @classmethod
    def _different(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError(f"{value}: names a seed twice")
        return value

    @model_validator(mode="after")
    def _belongs_together(self) -> StudyConfig:
        if not self.factors and not self.variants:
            raise ValueError("factors: an empty grid; name at least one factor or variant")
        if self.tune and not self.tune_seeds:
            raise ValueError("tune_seeds: is empty; tuning needs seeds of its own")
        if set(self.seeds) & set(self.tune_seeds):
            raise ValueError(f"tune_seeds = {self.tune_seeds}: must share none with seeds, which are kept fresh")
        if self.gate is not None and self.gate.metric not in (None, *self.metrics):
            raise ValueError(f"gate.metric = {self.gate.metric}: must be one of metrics: {', '.join(self.metrics)}")
        if self.main_metric not in self.metrics:
            raise ValueError(f"primary.metric = {self.main_metric}: must be one of metrics: {', '.join(self.metrics)}")
        return self

    @property
    def main_metric(self) -> str:
        """The primary comparison's metric; the first where none is named."""
        return (self.primary and self.primary.metric) or next(iter(self.metrics))
