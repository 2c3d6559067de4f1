"""From factors to arms: which combinations of levels are run, and which is compared with which. Reads no base config.

An arm is one combination of levels; with each seed it becomes a run. Its name is what tables and plots show. It is
compared with itself at the baseline's levels; where the baseline leaves a factor out, comparisons stay within each
level of that factor.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformer_vq.config import ConfigError
from transformer_vq.config.study import VARIANT, RandomDesign, StudyConfig

LAYER = "layer"  # the factor that the leave-one-layer designs add


@dataclass(frozen=True)
class Arm:
    """One combination: its levels by factor, and the settings that they stand for (dotted key -> value)."""

    name: str
    levels: dict[str, str]
    settings: dict[str, Any] = field(compare=False)
    parts: dict[str, str] = field(default_factory=dict, compare=False)
    """What each factor adds to the name; empty where the name is not made of parts."""


@dataclass(frozen=True)
class Design:
    """All arms in order, the reference of each arm that has one (by name), and the primary comparison's arm."""

    arms: list[Arm]
    references: dict[str, str]
    primary: str | None

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def contrasts(self) -> dict[str, tuple[str, str]]:
        """By compared arm: (where, what), like ("codes=64", "rotation − ste").

        (its name, "") when all have one reference, or the name is not made of parts.
        """
        one = len(set(self.references.values())) == 1
        found = {}
        for name, reference in self.references.items():
            a, b = self.arm(name), self.arm(reference)
            changed = [key for key in a.parts if a.levels[key] != b.levels[key]]
            where = " · ".join(part for key, part in a.parts.items() if key not in changed)
            sides = (" · ".join(arm.parts[key] for key in changed) for arm in (a, b))
            found[name] = (name, "") if one or not changed else (where, " − ".join(sides))
        return found


def make_design(study: StudyConfig, layers: int | None) -> Design:
    """Arms and comparisons of a study; `layers` is the base model's, for the leave-one-layer designs.

    Raises ConfigError for a baseline or primary comparison that names what is not there.
    """
    table = _Table(study)
    if isinstance(study.design, str) and study.design.startswith("leave"):
        return _leave_one_layer(study, table, layers)
    centre = table.named(study.baseline, "baseline")
    fixed = list(study.baseline) or list(table.levels)
    first = {key: next(iter(levels)) for key, levels in table.levels.items()}
    centre = {**first, **centre}
    if study.design == "one_at_a_time":
        combinations = [centre] + [
            {**centre, key: label} for key, levels in table.levels.items() for label in levels if label != centre[key]
        ]
        fixed = list(table.levels)
    else:
        chosen = _draw(study.design, table.size) if isinstance(study.design, RandomDesign) else range(table.size)
        combinations = [table.combination(i) for i in chosen]
    at_baseline = {key: centre[key] for key in fixed}
    if isinstance(study.design, RandomDesign):
        references = [{**levels, **at_baseline} for levels in combinations]
        combinations += [r for i, r in enumerate(references) if r not in combinations and r not in references[:i]]
    arms = [table.arm(levels) for levels in combinations]
    names = {tuple(arm.levels.items()): arm.name for arm in arms}
    compared = {
        arm.name: names[tuple({**arm.levels, **at_baseline}.items())]
        for arm in arms
        if {**arm.levels, **at_baseline} != arm.levels
    }
    for name, reference in study.against.items():
        for arm_name in (name, reference):
            if arm_name not in names.values():
                raise ConfigError(f"against.{name}: no arm {arm_name}; there is {', '.join(names.values())}")
        compared[name] = reference
    return Design(arms, compared, _primary(study, table, arms, compared, centre, fixed))


def grid_size(study: StudyConfig) -> int:
    """Arms of the full grid, without making them."""
    return math.prod(len(levels) for levels in (*study.factors.values(), study.variants) if levels)


class _Table:
    """Factors, their levels by label, and the names they go by."""

    def __init__(self, study: StudyConfig) -> None:
        self.levels: dict[str, dict[str, Any]] = {}
        if study.variants:
            self.levels[VARIANT] = dict(study.variants)
        for key, values in study.factors.items():
            named = values if isinstance(values, dict) else {label(value): value for value in values}
            if len(named) < len(values):
                raise ConfigError(f"factors.{key}: names a level twice: {', '.join(map(label, values))}")
            self.levels[key] = named
        self.short = short_names(self.levels)
        self.size = math.prod(map(len, self.levels.values()))

    def named(self, chosen: Mapping[str, Any], what: str) -> dict[str, str]:
        """Labels of levels that the YAML names by value or by label.  Raises ConfigError."""
        labels = {}
        for key, value in chosen.items():
            if key not in self.levels:
                raise ConfigError(f"{what}.{key}: no such factor; there is {', '.join(self.levels)}")
            known = self.levels[key]
            found = [name for name, level in known.items() if level == value and type(level) is type(value)]
            found = found or [name for name in known if name == label(value)]
            if not found:
                raise ConfigError(f"{what}.{key} = {label(value)}: no such level; there is {', '.join(known)}")
            labels[key] = found[0]
        return labels

    def settings(self, key: str, name: str) -> dict[str, Any]:
        """What a level sets."""
        value = self.levels[key][name]
        return dict(value) if key == VARIANT else {key: value}

    def combination(self, i: int) -> dict[str, str]:
        """The i-th point of the grid; the last factor varies fastest."""
        levels = {}
        for key, names in reversed(self.levels.items()):
            i, j = divmod(i, len(names))
            levels[key] = list(names)[j]
        return {key: levels[key] for key in self.levels}

    def arm(self, levels: dict[str, str]) -> Arm:
        """The arm of a combination."""
        settings: dict[str, Any] = {}
        for key, name in levels.items():
            settings.update(self.settings(key, name))
        parts = {key: self._part(key, name) for key, name in levels.items()}
        return Arm(" · ".join(parts.values()), levels, settings, parts)

    def _part(self, key: str, name: str) -> str:
        value = self.levels[key][name]
        plain = isinstance(value, str | dict) or name != label(value)  # speaks for itself, unlike a number
        return name if plain and "." not in self.short[key] else f"{self.short[key]}={name}"


def label(value: Any) -> str:
    """A level in a few characters: `ste`, `0.001`, `true`, `fsq levels=[8, 4, 4]`."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        kind = [str(value["kind"])] if "kind" in value else []
        return " ".join(kind + [f"{key}={label(v)}" for key, v in value.items() if key != "kind"])
    return json.dumps(value)


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """The shortest end of each dotted key that no other key shares."""
    keys = list(keys)
    names = {}
    for key in keys:
        parts = key.split(".")
        for n in range(1, len(parts) + 1):
            names[key] = ".".join(parts[-n:])
            if sum(other == names[key] or other.endswith("." + names[key]) for other in keys) == 1:
                break
    return names


def _draw(design: RandomDesign, size: int) -> list[int]:
    if design.n > size:
        raise ConfigError(f"design.n = {design.n}: must be at most {size}, the size of the grid")
    return sorted(random.Random(design.seed).sample(range(size), design.n))


def _primary(
    study: StudyConfig,
    table: _Table,
    arms: list[Arm],
    references: Mapping[str, str],
    centre: Mapping[str, str],
    fixed: list[str],
) -> str | None:
    if study.primary is None:
        return None
    named = table.named(study.primary.levels, "primary.levels")
    for key in table.levels:
        if key not in fixed and key not in named:
            raise ConfigError(f"primary.levels: must name a level of {key} too, which the baseline leaves open")
    wanted = {**centre, **named}
    return _compared(wanted, arms, references)


def _compared(wanted: Mapping[str, str], arms: list[Arm], references: Mapping[str, str]) -> str:
    for arm in arms:
        if arm.levels == wanted and arm.name in references:
            return arm.name
    levels = ", ".join(f"{key}: {name}" for key, name in wanted.items())
    raise ConfigError(f"primary.levels: {levels} is compared with nothing in this design")


def _leave_one_layer(study: StudyConfig, table: _Table, layers: int | None) -> Design:
    """In: one layer at the level, the others at the baseline. Out: all but one. Both: all layers at each level.

    `in` compares every arm with the baseline everywhere; `out` compares an arm that lacks a layer with the level
    everywhere.
    """
    if layers is None or len(table.levels) != 1 or not (key := next(iter(table.levels))).startswith("model.quantizer"):
        raise ConfigError(f"design = {study.design}: needs one factor, model.quantizer or a key below it")
    names = list(table.levels[key])
    base = table.named(study.baseline, "baseline").get(key, names[0])
    layer_key = "model.per_layer.{}" + key.removeprefix("model.quantizer")

    def everywhere(name: str) -> Arm:
        return Arm(f"{name} everywhere", {key: name, LAYER: "all"}, {key: table.levels[key][name]})

    arms, references = [everywhere(base)], {}
    for name in (n for n in names if n != base):
        whole = everywhere(name)
        arms.append(whole)
        references[whole.name] = arms[0].name
        inward = study.design == "leave_one_layer_in"
        inner, outer = (name, base) if inward else (base, name)
        for i in range(layers):
            settings = {key: table.levels[key][outer], layer_key.format(i): table.levels[key][inner]}
            arm = Arm(f"{name} {'in' if inward else 'but in'} layer {i}", {key: name, LAYER: str(i)}, settings)
            arms.append(arm)
            references[arm.name] = arms[0].name if inward else whole.name
    primary = None
    if study.primary is not None:
        rest = {k: v for k, v in study.primary.levels.items() if k != LAYER}
        wanted = {**table.named(rest, "primary.levels"), LAYER: label(study.primary.levels.get(LAYER, "all"))}
        primary = _compared(wanted, arms, references)
    return Design(arms, references, primary)
