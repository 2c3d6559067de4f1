"""Files of the paper's own implementation: a Flax checkpoint written by Orbax, or a flat `.npz` of its parameters.

Its training saves a train state: a folder `checkpoint_1000/` whose tree holds `params` beside the optimizer's. In a
`.npz` the names are joined by slashes ("transformer_layers_0/scanned_attn1/u"), with or without `params/` before them,
and `config_json` may hold its settings. Arrays come out as they are in the file, bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transformer_vq.config import ConfigError

Arrays = dict[str, NDArray[Any]]
CONFIG, PARAMS = "config_json", "params/"
KEPT = "reference-unused.npz"


class ReferenceFile(NamedTuple):
    """What a file holds: arrays by name, and the reference's settings where they are in it."""

    params: Arrays
    settings: dict[str, Any] | None


def read_reference(path: Path) -> ReferenceFile:
    """Parameters of a `.npz` or of an Orbax folder.  Raises ConfigError with one line."""
    if path.is_dir():
        return ReferenceFile(_below_params(_flat(_restore(path))), None)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file or folder")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path}: not readable as .npz: {error}") from None
    raw = arrays.pop(CONFIG, None)
    return ReferenceFile(_below_params(arrays), None if raw is None else json.loads(bytes(raw).decode()))


def write_reference(path: Path, params: Mapping[str, NDArray[Any]], settings: Mapping[str, Any]) -> None:
    """Write a `.npz`, or for any other name an Orbax folder; it is there whole or not at all.

    Raises ConfigError where something is there already, or Orbax is missing.
    """
    if path.exists():
        raise ConfigError(f"{path}: is there already; name another")
    path.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=path.parent, prefix=".writing-"))
    try:
        written = place / path.name
        if path.suffix == ".npz":
            text = np.frombuffer(json.dumps(settings).encode(), np.uint8)
            np.savez(written, **params, **{CONFIG: text})  # type: ignore[arg-type]
        else:
            _orbax().PyTreeCheckpointer().save(written.resolve(), {"params": _nested(params)})
        os.replace(written, path)
    finally:
        shutil.rmtree(place)


def write_unused(run: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Keep, in a run of ours, arrays that no model of ours has, so that what comes in goes out again."""
    np.savez(run / KEPT, **arrays)  # type: ignore[arg-type]


def read_unused(run: Path) -> Arrays:
    """What `write_unused` kept there."""
    if not (run / KEPT).is_file():
        return {}
    with np.load(run / KEPT, allow_pickle=False) as file:
        return dict(file)


def _restore(path: Path) -> Mapping[str, Any]:
    """The tree of an Orbax checkpoint, as numpy arrays."""
    orbax = _orbax()
    try:
        checkpointer = orbax.PyTreeCheckpointer()
        structure = checkpointer.metadata(path.resolve()).item_metadata.tree
        wanted = _map(structure, lambda _: orbax.RestoreArgs(restore_type=np.ndarray))
        tree: Mapping[str, Any] = checkpointer.restore(path.resolve(), restore_args=wanted)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: not readable as a checkpoint of Orbax: {reason}") from None
    return tree


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError:
        raise ConfigError("Orbax checkpoints need more packages: pip install 'transformer-vq[orbax]'") from None
    return orbax.checkpoint


def _map(tree: Any, change: Any) -> Any:
    return {key: _map(value, change) for key, value in tree.items()} if isinstance(tree, Mapping) else change(tree)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Arrays:
    flat: Arrays = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, np.ndarray):
            narrow = value.dtype.name == "bfloat16"  # which numpy itself and torch.from_numpy do not know
            flat[f"{prefix}{key}"] = value.astype(np.float32) if narrow else value
    return flat


def _nested(params: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in params.items():
        *above, last = name.split("/")
        at = tree
        for key in above:
            at = at.setdefault(key, {})
        at[last] = array
    return tree


def _below_params(arrays: Arrays) -> Arrays:
    """The parameters alone, where they stand below `params/`."""
    below = {name.removeprefix(PARAMS): array for name, array in arrays.items() if name.startswith(PARAMS)}
    return below or arrays
