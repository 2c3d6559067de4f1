"""Arrays of `.npz` files, each read whole and held against its checksum.

`numpy.load` reads as much of an array as the array's own header says, so that a damaged header gives fewer rows and no
complaint; and what it raises for damage has many types. Nothing here is unpickled.
"""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transformer_vq.config import ConfigError
from transformer_vq.config.explain import one_line


def array_names(path: Path) -> list[str]:
    """Names of a file's arrays.  Raises ConfigError, naming the file, where it is no whole `.npz` file."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                archive.open(entry).close()  # an entry whose two names differ is damaged
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except Exception as error:  # zipfile raises whatever a damaged byte leads it to
        raise ConfigError(f"data.source: {path} is not readable as .npz: {_reason(error)}") from None


def read_array(path: Path, name: str) -> NDArray[Any]:
    """One array.  Raises ConfigError, naming file and array, where it is damaged, pickled or not there."""
    try:
        with zipfile.ZipFile(path) as archive:
            entry = f"{name}.npy" if f"{name}.npy" in archive.NameToInfo else name
            content = archive.read(entry)  # all of it: the checksum is of all of it
        return _parse(content)
    except Exception as error:  # as above, and whatever numpy makes of a header
        raise ConfigError(f"data.source: array {name} of {path} is not readable: {_reason(error)}") from None


def _parse(content: bytes) -> NDArray[Any]:
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"format version {version} of .npy is not one of (1, 0), (2, 0)")
    shape, fortran, dtype = read_header[version](file)
    if dtype.hasobject:
        raise ValueError("it holds pickled Python objects")
    count = math.prod(shape)
    if len(content) - file.tell() != count * dtype.itemsize:
        raise ValueError(f"its header says {dtype} {shape}, its content is {len(content) - file.tell()} bytes")
    flat = np.frombuffer(content, dtype, count, file.tell())
    return flat.reshape(shape, order="F" if fortran else "C")


def _reason(error: Exception) -> str:
    return one_line(error) or type(error).__name__
