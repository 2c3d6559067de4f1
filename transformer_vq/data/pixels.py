"""Pictures as text of bytes: row by row, red, green and blue of a pixel in turn, as ImageNet64 is modelled.

[Lingle 2309.16354 §5; the order is that of van den Oord 1601.06759]
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transformer_vq.config import ConfigError
from transformer_vq.config.explain import one_line
from transformer_vq.data.pictures import open_picture

if TYPE_CHECKING:
    from PIL.Image import Image


def picture_of(value: Any, where: str) -> Image | None:
    """The picture in a dataset's row, as pictures.py reads it; None where the row holds something else.

    It may be decoded, a file or its bytes (as `datasets` and parquet hold it), or an array of pixels (H, W, 3) or
    (H, W) uint8.  Raises ConfigError, naming `where`, for what cannot be read or shown.
    """
    if isinstance(value, dict) and (isinstance(value.get("bytes"), bytes) or value.keys() == {"bytes", "path"}):
        named = f"{where} ({value['path']})" if value.get("path") else where
        return open_picture(content_of(value, named), named)
    if isinstance(value, np.ndarray):
        from PIL import Image

        pixels = value.dtype == np.uint8 and value.size > 0 and (value.ndim == 2 or value.shape[2:] == (3,))
        return Image.fromarray(np.ascontiguousarray(value)) if pixels else None
    return open_picture(value, where) if hasattr(value, "tobytes") and hasattr(value, "convert") else None


def content_of(value: dict[str, Any], where: str) -> bytes | Path:
    """What `datasets` and parquet hold of a picture: its bytes, or where they are.  Raises ConfigError for neither."""
    content = value.get("bytes")
    if isinstance(content, bytes):
        return content
    path = value.get("path")
    if not isinstance(path, str):
        raise ConfigError(f"data.source: {where} has neither the bytes nor the path of a picture")
    if "://" not in path:
        return Path(path)
    import fsspec  # what `datasets` reads streams with

    try:
        with fsspec.open(path, "rb") as file:
            fetched: bytes = file.read()
            return fetched
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.source: {where} cannot be had: {one_line(error)}") from None


def pixel_bytes(picture: Image, size: int | None) -> bytes:
    """Three bytes a pixel. With `size`, the shorter side is resized to it by a box filter and the centre cut out.

    The box filter is that of the downsampled ImageNet [Chrabaszcz 1707.08819], so that ImageNet64 comes out as the
    paper had it; the image benchmark resizes by a bicubic filter. Grey becomes colour.
    """
    from PIL import Image

    picture = picture.convert("RGB")
    if size is not None and picture.size != (size, size):
        side = min(picture.size)
        left, top = ((length - side) // 2 for length in picture.size)
        picture = picture.resize((size, size), Image.Resampling.BOX, (left, top, left + side, top + side))
    return picture.tobytes()
