"""Files of the paper's own implementation: its Flax/Orbax checkpoints, or a flat `.npz` of its parameters.

Its training saves a train state: a folder `checkpoint_1000/` with one file, `checkpoint`, whose tree holds `params`
beside `step` and `opt_state` (flax_tree.py). Such a folder is what is written here too: its loader and today's Orbax
both read it. Of a folder of another layout, such as newer Orbax makes, Orbax itself reads the parameters. In a `.npz`
the names are joined by slashes ("transformer_layers_0/scanned_attn1/u"), with or without `params/` before them, and
`config_json` may hold its settings. Arrays come out as they are in the file, bit for bit; bf16 comes as float32.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transformer_vq.config import ConfigError
from transformer_vq.config.extras import need
from transformer_vq.convert.flax_tree import Tree, flat, nested, pack, unpack
from transformer_vq.files import write, writing
from transformer_vq.training.run_folder import KEPT

Arrays = dict[str, NDArray[Any]]
CONFIG, PARAMS = "config_json", "params/"
TREE = "checkpoint"  # the one file in a folder of the reference's
ABOUT = "_METADATA"  # what newer Orbax has in its place


class ReferenceFile(NamedTuple):
    """What a file holds."""

    params: Arrays
    """By name, without `params/`."""
    settings: dict[str, Any] | None
    """The reference's, where they are in it."""
    rest: Tree
    """Of a train state all but the parameters, as it was packed."""


def read_reference(path: Path) -> ReferenceFile:
    """A `.npz`, a folder, or a Flax file.  Raises ConfigError with one line."""
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    try:
        if zipfile.is_zipfile(path):
            return _read_npz(path)
        if (path / TREE).is_file():
            tree = unpack((path / TREE).read_bytes())
        elif path.is_dir():
            if inside := [child for child in path.iterdir() if (child / TREE).is_file()]:
                raise ConfigError(f"{path}: holds checkpoints; name one, such as {max(inside)}")
            tree = _restore(path)
        else:
            tree = unpack(path.read_bytes())
        params = tree.pop("params", tree)
        return ReferenceFile(flat(params), None, {} if params is tree else tree)
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: not readable as a checkpoint or .npz: {reason}") from None


def write_reference(
    path: Path, params: Mapping[str, NDArray[Any]], settings: Mapping[str, Any], rest: Mapping[str, Any] | None = None
) -> None:
    """Write a `.npz` with the settings, or for any other name a folder with `rest`; it is there whole or not at all.

    Raises ConfigError where something is there already, WriteError.
    """
    if path.exists():
        raise ConfigError(f"{path}: is there already; name another")
    with ExitStack() as whole:
        whole.enter_context(writing(path, sum(array.nbytes for array in params.values())))
        path.parent.mkdir(parents=True, exist_ok=True)
        place = Path(whole.enter_context(tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-")))
        written = place / path.name
        if path.suffix == ".npz":
            text = np.frombuffer(json.dumps(settings).encode(), np.uint8)
            np.savez(written, allow_pickle=False, **{**params, CONFIG: text})
        else:
            written.mkdir()
            tree = {**(rest or {}), "params": nested(params)}
            (written / TREE).write_bytes(pack({key: tree[key] for key in sorted(tree)}))
        os.replace(written, path)


def write_kept(run: Path, unused: Mapping[str, NDArray[Any]], rest: Mapping[str, Any]) -> None:
    """Keep, in a run of ours, what no model of ours has, so that what comes in goes out again.

    unused: parameters that are read by nothing; rest: the other parts of a train state.
    """
    if unused or rest:
        data = pack({"unused": nested(unused), "rest": dict(rest)})
        write(run / KEPT, lambda place: place.write_bytes(data), len(data))


def read_kept(run: Path) -> tuple[Arrays, Tree]:
    """(unused, rest) that `write_kept` kept there."""
    if not (run / KEPT).is_file():
        return {}, {}
    kept = unpack((run / KEPT).read_bytes())
    return flat(kept["unused"]), kept["rest"]


def _read_npz(path: Path) -> ReferenceFile:
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    raw = arrays.pop(CONFIG, None)
    settings = None
    if raw is not None:
        try:
            settings = json.loads(raw.tobytes())
        except ValueError:
            settings = None
        if not isinstance(settings, dict):
            raise ValueError(f"{CONFIG} is not the text of a JSON object")
    below = {name.removeprefix(PARAMS): array for name, array in arrays.items() if name.startswith(PARAMS)}
    return ReferenceFile(below or arrays, settings, {})


def _restore(path: Path) -> Tree:
    """The parameters of a folder of another layout, read by Orbax as numpy arrays.  Raises ConfigError, ValueError."""
    if not (path / ABOUT).is_file():
        raise ConfigError(f"{path}: is no checkpoint; it holds neither a file {TREE} nor Orbax's {ABOUT}")
    jax, orbax = need("jax", str(path)), need("orbax.checkpoint", str(path))
    checkpointer, path = orbax.PyTreeCheckpointer(), path.resolve()
    try:
        structure = checkpointer.metadata(path).item_metadata.tree
        wanted = jax.tree.map(lambda _: orbax.RestoreArgs(restore_type=np.ndarray), structure)
        tree = checkpointer.restore(path, restore_args=wanted)
    except (KeyError, AttributeError) as error:
        raise ValueError(str(error)) from None
    return {"params": tree["params"]} if "params" in tree else dict(tree)
