"""From a config file, a recipe's name or a run folder, and dotted overrides, to validated settings.

Every complaint is one `ConfigError`: key, value and what is allowed, in one line.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from transformer_vq.config.base import ConfigError, Settings
from transformer_vq.config.explain import explain, one_line
from transformer_vq.files import write_text

S = TypeVar("S", bound=Settings)


def recipes_folder() -> Path:
    """The shipped configs: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def recipes() -> list[str]:
    """Names of the shipped configs, like `lm/tiny`."""
    folder = recipes_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def find_config(source: str | Path) -> Path:
    """The file behind CONFIG: itself, a run folder's `config.yaml`, or the recipe of that name."""
    path = Path(source)
    if path.is_dir():
        if (path / "config.yaml").is_file():
            return path / "config.yaml"
        raise ConfigError(f"{source}: a folder without config.yaml, not a run")
    if path.is_file():
        return path
    name = path.with_suffix("").as_posix() if path.suffix == ".yaml" else str(source)
    recipe = recipes_folder() / f"{name.removeprefix('configs/')}.yaml"
    if recipe.is_file():
        return recipe
    near = difflib.get_close_matches(name, recipes(), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{source}: no such file, run folder or recipe (recipes: {', '.join(recipes())}){hint}")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as plain dicts and lists; `1e-3` is a number."""
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not readable as YAML: {one_line(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold keys and values, not {type(tree).__name__}")
    return {str(key): value for key, value in tree.items()}


def read_config(source: str | Path) -> dict[str, Any]:
    """The tree behind CONFIG, with what it `extends` filled in.

    `extends: NAME` names a recipe, or a file beside this one; keys that this one has win. A block with a `kind` is
    taken whole: its other keys are those of the kind.
    """
    chain: list[Path] = []
    path = find_config(source)
    tree: dict[str, Any] = {}
    while True:
        if path in chain:
            raise ConfigError(f"extends: {' extends '.join(map(str, [*chain, path]))}, which has no end")
        chain.append(path)
        own = read_yaml(path)
        base = own.pop("extends", None)
        tree = _filled(own, tree)
        if base is None:
            return tree
        if not isinstance(base, str):
            raise ConfigError(f"{path}: extends = {base}: must be the name of a config")
        beside = path.parent / base
        path = beside if beside.is_file() else find_config(base)


def _filled(base: Any, tree: Any) -> dict[str, Any]:
    """`tree` over `base`, block by block."""
    out = dict(base)
    for key, value in tree.items():
        old = out.get(key)
        mixed = isinstance(value, dict) and isinstance(old, dict) and "kind" not in value
        out[key] = _filled(old, value) if mixed else value
    return out


def parse_override(override: str) -> tuple[str, Any]:
    """Key and value of `dotted.key=value`; the value is YAML.  Raises ConfigError."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{override}: overrides are written dotted.key=value")
    if any("\ud800" <= c <= "\udfff" for c in override):  # a byte that was no character, on the command line
        encoding = sys.getfilesystemencoding()
        raise ConfigError(f"{key} = {text}: is not text in this locale, whose encoding is {encoding}")
    try:
        value = OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=True)["value"]  # type: ignore[index,call-overload]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{key} = {text}: not readable as YAML: {one_line(error)}") from None
    return key, value


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested dicts, making the dicts between where they are missing or null."""
    *parents, last = key.split(".")
    at = tree
    for i, name in enumerate(parents):
        if at.get(name) is None:
            at[name] = {}
        at = at[name]
        if not isinstance(at, dict):
            raise ConfigError(f"{key}: {'.'.join(parents[: i + 1])} holds a value, not keys")
    at[last] = value


def load_config(source: str | Path, overrides: Sequence[str], schema: type[S]) -> S:
    """Read, override and validate.  Raises ConfigError with one line for the first thing that is wrong."""
    tree = read_config(source)
    for override in overrides:
        set_key(tree, *parse_override(override))
    return validate(tree, schema)


def validate(tree: Mapping[str, Any], schema: type[S]) -> S:
    """Settings from plain dicts.  Raises ConfigError with one line for the first thing that is wrong."""
    try:
        return schema.model_validate(dict(tree))
    except ValidationError as error:
        raise ConfigError(explain(error, schema)) from None


def save_config(settings: Settings, path: Path) -> None:
    """Write settings as YAML, in the order of their definition, in one piece.  Raises WriteError."""
    write_text(path, yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines `key: old -> new` for every leaf in which two dumped configs differ."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += difference(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a} -> {b}")
    return lines
