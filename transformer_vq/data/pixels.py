"""Pictures as text of bytes: row by row, red, green and blue of a pixel in turn, as ImageNet64 is modelled.

[Lingle 2309.16354 §5; the order is that of van den Oord 1601.06759]
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


def picture_of(value: Any) -> Image | None:
    """The picture in a dataset's row; else None.

    It may be decoded, an array of pixels (H, W, 3) or (H, W) uint8, or as parquet holds it where nothing says that it
    is one.  Raises OSError for bytes that are no picture.
    """
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        from PIL import Image

        return Image.open(io.BytesIO(value["bytes"]))
    if isinstance(value, np.ndarray):
        from PIL import Image

        pixels = value.dtype == np.uint8 and value.size > 0 and (value.ndim == 2 or value.shape[2:] == (3,))
        return Image.fromarray(np.ascontiguousarray(value)) if pixels else None
    return value if hasattr(value, "tobytes") and hasattr(value, "convert") else None


def pixel_bytes(picture: Image, size: int | None) -> bytes:
    """Three bytes a pixel. With `size`, the shorter side is resized to it by a box filter and the centre cut out.

    The box filter is that of the downsampled ImageNet [Chrabaszcz 1707.08819]; grey becomes colour.
    """
    from PIL import Image

    picture = picture.convert("RGB")
    if size is not None and picture.size != (size, size):
        side = min(picture.size)
        left, top = ((length - side) // 2 for length in picture.size)
        picture = picture.resize((size, size), Image.Resampling.BOX, (left, top, left + side, top + side))
    return picture.tobytes()
