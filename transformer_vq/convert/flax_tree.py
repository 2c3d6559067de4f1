"""Trees of arrays as Flax writes them: msgpack, each array an extension of type 1 holding (shape, dtype, bytes).

This is what the paper's code saves (flax 0.6.11, orbax-checkpoint 0.1.7): the whole train state in one file
`checkpoint_1000/checkpoint`, or, with Orbax switched off, in the file `checkpoint_1000` itself. What is read stays
packed until it is asked for, so that an optimizer's state, which nobody here understands, goes out byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

ARRAY = 1  # Flax's number for this extension type
Tree = dict[str, Any]


def unpack(data: bytes) -> Tree:
    """The tree, its arrays still packed.  Raises ValueError when the bytes are no such tree."""
    try:
        tree = msgpack.unpackb(data)
    except msgpack.UnpackException as error:
        raise ValueError(f"not msgpack: {error or type(error).__name__}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"holds {type(tree).__name__}, not a tree of arrays")
    return tree


def pack(tree: Mapping[str, Any]) -> bytes:
    """The bytes that Flax would write; what came packed goes out unchanged."""
    return bytes(msgpack.packb(dict(tree), default=_packed, strict_types=True))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, NDArray[Any]]:
    """Every array under the names on its path, joined by slashes.  bf16, which numpy lacks, becomes float32.

    Raises ValueError naming a leaf that is no array.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for key, leaf in tree.items():
        name = f"{prefix}{key}"
        if isinstance(leaf, Mapping):
            arrays |= flat(leaf, f"{name}/")
        elif isinstance(leaf, np.ndarray):
            arrays[name] = leaf.astype(np.float32) if leaf.dtype.name == "bfloat16" else leaf
        elif isinstance(leaf, msgpack.ExtType) and leaf.code == ARRAY:
            arrays[name] = _array(leaf.data)
        else:
            raise ValueError(f"{name} holds {str(leaf)[:60]}, not an array")
    return arrays


def nested(arrays: Mapping[str, Any]) -> Tree:
    """The way back of `flat`; keys in JAX's order, the alphabet's."""
    tree: Tree = {}
    for name in sorted(arrays, key=lambda name: name.split("/")):
        *above, last = name.split("/")
        at = tree
        for key in above:
            at = at.setdefault(key, {})
        at[last] = arrays[name]
    return tree


def _packed(leaf: Any) -> msgpack.ExtType:
    if not isinstance(leaf, np.ndarray):
        raise TypeError(f"{type(leaf).__name__} is not an array")
    return msgpack.ExtType(ARRAY, msgpack.packb((leaf.shape, leaf.dtype.name, leaf.tobytes())))


def _array(data: bytes) -> NDArray[Any]:
    shape, name, content = msgpack.unpackb(data)
    if name == "bfloat16":  # the upper half of a float32
        return (np.frombuffer(content, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(content, np.dtype(name)).reshape(shape)
