"""From a study's YAML to its runs: every setting resolved and validated, every run named by its content.

Two arms whose configurations come out the same share one run folder, and no configuration is run twice. Where a study
tunes, the runs of the comparison are known only once the tuning runs are there.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformer_vq.config import ConfigError, Settings, validate
from transformer_vq.config.load import parse_override, read_config, set_key
from transformer_vq.config.study import StudyConfig
from transformer_vq.studies.branch import branched
from transformer_vq.studies.checks import check_branch, check_emergence, check_gate, check_recurrence
from transformer_vq.studies.design import Arm, Design, grid_size, label, make_design, short_names
from transformer_vq.studies.kinds import Kind, digest, flops_per_step, kind_of, load, steps_for_tokens

MANY = 1000  # more runs than this want to be asked for
DOTTED = ("overrides", "factors", "tune")  # blocks of the study whose keys are dotted themselves
Stage = Literal["base", "tune", "final"]
BASE_SEEDS = 2**40  # the base of seed s is trained with seed s + this: its batches are not those of the arms
BASE = "base"  # the name of what a branch goes on from, in tables of runs


@dataclass(frozen=True)
class Run:
    """One run: an arm with a seed, and in a tuning study the values that are tried or were chosen."""

    arm: str
    seed: int
    stage: Stage
    tuned: dict[str, Any]
    settings: Settings
    digest: str
    folder: Path
    command: str
    """What does the same by hand."""
    base: Run | None = None
    """The run that it goes on from, in a study with a branch."""


@dataclass(frozen=True)
class Study:
    """A study that is ready to run."""

    name: str
    source: str
    """What the user named it by."""
    settings: StudyConfig
    kind: Kind
    design: Design
    tree: dict[str, Any] = field(repr=False)
    """The base config with the study's overrides."""
    grids: dict[str, list[dict[str, Any]]] = field(repr=False)
    """By arm: the values of `tune` that are tried; keys that its configuration lacks are left out."""
    steps: dict[str, int] = field(repr=False)
    """By arm: `train.steps` within the budget; empty without one."""

    @property
    def folder(self) -> Path:
        """Where the study writes."""
        return Path(self.settings.run_dir)

    def base_runs(self) -> list[Run]:
        """The runs that all others go on from, one a seed; none without a branch."""
        branch = self.settings.branch
        if branch is None:
            return []
        changes = {**self.settings.overrides, **branch.settings, "train.steps": branch.steps}
        settings = _settle(self.tree, changes, self.kind)
        seeds = [*(self.settings.tune_seeds if self.settings.tune else []), *self.settings.seeds]
        return [self._run(BASE, seed, "base", {}, changes, settings, None) for seed in seeds]

    def tuning_runs(self) -> list[Run]:
        """All runs of the tuning stage; none where nothing is tuned."""
        if not self.settings.tune:
            return []
        chosen = [(arm, tuned) for arm in self.design.arms for tuned in self.grids[arm.name]]
        return self._runs(chosen, self.settings.tune_seeds, "tune")

    def final_runs(self, chosen: Mapping[str, dict[str, Any] | None]) -> list[Run]:
        """The runs that are compared; `chosen` gives the tuned values by arm, None where tuning has found none."""
        arms = [(arm, chosen[arm.name] if self.settings.tune else {}) for arm in self.design.arms]
        return self._runs([(arm, tuned) for arm, tuned in arms if tuned is not None], self.settings.seeds, "final")

    def size(self) -> int:
        """Runs of all stages, at most: some may share a configuration."""
        tuning = sum(map(len, self.grids.values())) * len(self.settings.tune_seeds) if self.settings.tune else 0
        return len(self.base_runs()) + tuning + len(self.design.arms) * len(self.settings.seeds)

    def _runs(self, chosen: Iterable[tuple[Arm, dict[str, Any]]], seeds: Sequence[int], stage: Stage) -> list[Run]:
        """Seed by seed, so that a study that is cut short has the same seeds of every arm."""
        prepared = []
        for arm, tuned in chosen:
            changes = {**self.settings.overrides, **arm.settings, **tuned}
            if arm.name in self.steps:
                changes["train.steps"] = self.steps[arm.name]
            prepared.append((arm, tuned, changes, _settle(self.tree, changes, self.kind)))
        bases = {run.seed: run for run in self.base_runs()}
        return [
            self._run(arm.name, seed, stage, tuned, changes, settings, bases.get(seed))
            for seed in seeds
            for arm, tuned, changes, settings in prepared
        ]

    def _run(
        self,
        arm: str,
        seed: int,
        stage: Stage,
        tuned: dict[str, Any],
        changes: dict[str, Any],
        settings: Settings,
        base: Run | None,
    ) -> Run:
        drawn = seed + BASE_SEEDS if stage == "base" else seed
        settings = settings.model_copy(update={"seed": drawn})
        if base is not None:
            settings, added = branched(settings, base.folder)
            changes = {**changes, **added}
        content = digest(settings)
        known = sorted(self.folder.glob(f"*-{content}"))
        words = [arm, *(f"{name}={label(tuned[key])}" for key, name in short_names(tuned).items()), f"seed{seed}"]
        folder = known[0] if known else self.folder / f"{_slug(' '.join(words))}-{content}"
        settings = settings.model_copy(update={"run_dir": str(folder)})
        changes = {**changes, "seed": drawn, "run_dir": str(folder)}
        overrides = " ".join(shlex.quote(f"{key}={_written(value)}") for key, value in changes.items())
        program = f"transformer-vq {self.kind.command}" if self.kind.command else f"(within study {self.name})"
        command = f"{program} {shlex.quote(self.settings.base)} {overrides}"
        return Run(arm, seed, stage, tuned, settings, content, folder, command, base)


def load_study(source: str | Path, overrides: Sequence[str] = (), many: bool = False) -> Study:
    """Read and check a whole study: every arm's configuration is validated before anything runs.

    `many` allows more than 1,000 runs.  Raises ConfigError with one line for the first thing that is wrong.
    """
    settings = _read(source, overrides)
    draws = grid_size(settings) if settings.design == "grid" else 0
    _few_enough(draws * len(settings.seeds), many)
    tree = read_config(settings.base)
    kind = kind_of(tree, settings.base)
    base = _settle(tree, settings.overrides, kind)
    layers = base.model.layers if hasattr(base, "model") else None
    design = make_design(settings, layers)
    check_gate(settings, design)
    if settings.branch is not None and not hasattr(base, "model"):
        raise ConfigError("branch: is for language models, with or without recall")
    grids = {arm.name: _tuning_grid(settings, arm, tree, kind) for arm in design.arms}
    for key in settings.tune:
        if not any(key in tuned for grid in grids.values() for tuned in grid):
            raise ConfigError(f"tune.{key}: no such key in any arm")
    steps = _steps(settings, design, tree, kind)
    study = Study(Path(source).stem, str(source), settings, kind, design, tree, grids, steps)
    _few_enough(study.size(), many)
    runs = [*study.final_runs({arm.name: {} for arm in design.arms}), *study.tuning_runs()]
    arms = {run.arm: run.settings for run in runs}
    check_emergence(settings, arms)
    check_recurrence(settings, arms)
    if settings.branch is not None:
        check_branch(study.base_runs()[0].settings, arms)
        runs += study.base_runs()[:1]
    if kind.check_names is not None:
        for model in {run.arm: run.settings.model for run in runs}.values():  # type: ignore[attr-defined]
            load(kind.check_names)(model)
    return study


def _read(source: str | Path, overrides: Sequence[str]) -> StudyConfig:
    """The study's file with overrides, of which `overrides.data.source=…` sets the one key `data.source`."""
    tree = read_config(source)
    for key, value in map(parse_override, overrides):
        block, _, dotted = key.partition(".")
        if key.startswith("branch.from.") and isinstance(tree.get("branch"), dict):
            tree["branch"].setdefault("from", {})[key.removeprefix("branch.from.")] = value
        elif dotted and block in DOTTED and isinstance(tree.get(block, {}), dict):
            tree.setdefault(block, {})[dotted] = value
        else:
            set_key(tree, key, value)
    return validate(tree, StudyConfig)


def _few_enough(runs: int, many: bool) -> None:
    if runs > MANY and not many:
        raise ConfigError(
            f"factors: {runs:,} runs, more than {MANY:,}; say --yes, or draw some: design: {{kind: random}}"
        )


def _settle(tree: Mapping[str, Any], changes: Mapping[str, Any], kind: Kind) -> Settings:
    """The validated settings of a run: the base's tree with dotted keys set."""
    settled = copy.deepcopy(dict(tree))
    for key, value in changes.items():
        set_key(settled, key, copy.deepcopy(value))
    return validate(settled, kind.settings_class())


def _tuning_grid(study: StudyConfig, arm: Arm, tree: Mapping[str, Any], kind: Kind) -> list[dict[str, Any]]:
    """Every combination of tuned values whose keys this arm's configuration has: `none` has no commitment weight."""
    keys = []
    for key, values in study.tune.items():
        if key in study.factors:
            raise ConfigError(f"tune.{key}: is a factor already; a key is varied or tuned")
        try:
            for value in values:
                _settle(tree, {**study.overrides, **arm.settings, key: value}, kind)
            keys.append(key)
        except ConfigError as error:
            if not str(error).startswith(f"{key}: no such key"):
                raise
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(study.tune[key] for key in keys))]


def _steps(study: StudyConfig, design: Design, tree: Mapping[str, Any], kind: Kind) -> dict[str, int]:
    """`train.steps` of each arm within the budget."""
    if study.budget is None:
        return {}
    settings = {arm.name: _settle(tree, {**study.overrides, **arm.settings}, kind) for arm in design.arms}
    if study.budget.tokens is not None:
        return {name: steps_for_tokens(s, study.budget.tokens) for name, s in settings.items()}
    target = study.budget.flops
    if target == "baseline":
        name = next(iter(design.references.values()), design.arms[0].name)
        target = flops_per_step(settings[name]) * settings[name].train.steps  # type: ignore[attr-defined]
    assert isinstance(target, float)
    return {name: max(1, math.floor(target / flops_per_step(s))) for name, s in settings.items()}


def _slug(text: str) -> str:
    """A name for a folder: letters, digits, a few marks, of those that the file system can write, and not too long."""
    plain = re.sub(r"[^\w.=]+", "-", text).strip("-.")[:80]
    encoding = sys.getfilesystemencoding()
    return plain.encode(encoding, "ignore")[:200].decode(encoding, "ignore").strip("-.") or "run"


def _written(value: Any) -> str:
    """A value as an override on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
