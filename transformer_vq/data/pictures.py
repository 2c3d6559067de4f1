"""The one reader of pictures, for the image benchmark and for pictures as text: a file's pixels as it means them.

    orientation    as EXIF, XMP or TIFF says: upright
    transparency   laid over white, also that of palettes and of a single transparent colour
    palette        colour; 1 bit: 0 and 255; 2 and 4 bits: stretched to 255
    CMYK, YCbCr    the plain formulas; colour profiles are not applied
    JPEG with several pictures (MPO, as phones write)    the first: the others are previews and maps of it

What 8 bits and one picture cannot show is refused by name: more than 8 bits a channel, Lab, files of several frames.
So is a file that is damaged, as far as its format can tell (PNG has checksums, JPEG has none).

How a picture is made smaller is not decided here: the benchmark resizes by a bicubic filter (images/pictures.py), the
language model by the box filter of the downsampled ImageNet (pixels.py).
"""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from transformer_vq.config import ConfigError
from transformer_vq.config.explain import one_line, printable

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset(
    ".png .jpg .jpeg .jfif .jpe .bmp .webp .gif .ppm .pgm .pbm .tif .tiff .avif".split()  # noqa: SIM905, one line
)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # PIL knows more; some would run other programs
GREY_MODES = frozenset({"1", "L", "LA", "La"})
COLOUR_MODES = frozenset({"RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV"})
ALPHA_MODES = frozenset({"LA", "La", "RGBA", "RGBa", "PA"})
BACKGROUND = (255, 255, 255, 255)
ORIENTATION = 0x0112
ON_ITS_SIDE = (5, 6, 7, 8)


class Header(NamedTuple):
    """What is known of a picture before its pixels are decoded."""

    channels: int
    """1 grey, 3 colour."""
    size: tuple[int, int]
    """(width, height)."""


def open_picture(content: Path | bytes | Image, where: str) -> Image:
    """A picture, upright and opaque, of PIL's mode L or RGB.  Raises ConfigError, naming `where`, for what is none."""
    from PIL import Image, ImageOps

    where = printable(where)
    image = _opened(content, where)
    _check_kind(image, where)
    try:
        if image.format == "PNG" and not isinstance(content, Image.Image):
            _opened(content, where).verify()  # every checksum: decoding alone passes over those of the pixels
        upright = ImageOps.exif_transpose(image)
        mode = "L" if image.mode in GREY_MODES else "RGB"
        if image.mode in ALPHA_MODES or "transparency" in image.info:
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, BACKGROUND), upright)
        return upright.convert(mode)
    except Exception as error:  # PIL's decoders raise whatever they stumble over in a damaged file
        raise _unreadable(where, error) from None


def header(content: Path | bytes | Image, where: str, *, upright: bool = True) -> Header:
    """Channels and size of a picture, mostly without decoding it.  Raises ConfigError, naming `where`.

    upright: the size once it is turned; else sides may be exchanged.
    """
    where = printable(where)
    if isinstance(content, Path):
        try:
            with content.open("rb") as file:
                return _header(_opened(file, where), where, upright)
        except OSError as error:
            raise _unreadable(where, error) from None
    return _header(_opened(content, where), where, upright)


def _header(image: Image, where: str, upright: bool) -> Header:
    _check_kind(image, where)
    width, height = image.size
    try:
        # A TIFF file's size is that of the upright picture already, and its tag goes when it is loaded.
        look = upright and width != height and image.format != "TIFF"
        turned = look and image.getexif().get(ORIENTATION) in ON_ITS_SIDE
    except Exception as error:  # as above
        raise _unreadable(where, error) from None
    return Header(1 if image.mode in GREY_MODES else 3, (height, width) if turned else (width, height))


def is_picture(path: Path) -> bool:
    """Its name says so, or else its first bytes."""
    if path.suffix.lower() in SUFFIXES:
        return True
    from PIL import Image

    try:
        with Image.open(path, formats=_formats()):
            return True
    except Exception:  # whatever it is, and whether it can be read: no picture by name, none by content
        return False


def _opened(content: Path | bytes | IO[bytes] | Image, where: str) -> Image:
    from PIL import Image, UnidentifiedImageError

    if isinstance(content, Image.Image):
        return content
    try:
        raw = content.read_bytes() if isinstance(content, Path) else content
        return Image.open(io.BytesIO(raw) if isinstance(raw, bytes) else raw, formats=_formats())
    except UnidentifiedImageError:
        kinds = ", ".join(_formats())
        raise ConfigError(f"data.source: {where} is not a readable picture: it is none of {kinds}") from None
    except Exception as error:  # a file out of reach, or a damaged header
        raise _unreadable(where, error) from None


def _check_kind(image: Image, where: str) -> None:
    """Raises ConfigError for what cannot be shown truly."""
    if image.mode not in GREY_MODES | COLOUR_MODES:
        raise ConfigError(f"data.source: {where} has pixels of mode {image.mode}; 8-bit grey or colour is read")
    try:
        deep, frames = _is_deep(image), image.format != "MPO" and getattr(image, "is_animated", False)
        count = getattr(image, "n_frames", 1) if frames else 1
    except Exception as error:  # frames are counted by walking through the file
        raise _unreadable(where, error) from None
    if deep:
        raise ConfigError(f"data.source: {where} has more than 8 bits a channel; 8-bit grey or colour is read")
    if frames:
        raise ConfigError(f"data.source: {where} holds {count} frames; a picture is one: cut them out or leave it out")


def _is_deep(image: Image) -> bool:
    """More than 8 bits a channel, which PIL would cut off without a word (colour; grey has a mode of its own)."""
    if image.format == "TIFF":
        depths: tuple[int, ...] = getattr(image, "tag_v2", {}).get(258, (8,))  # BitsPerSample
        return max(depths) > 8
    tiles = [tile[3] for tile in getattr(image, "tile", [])]  # (decoder, box, offset, what the decoder is told)
    if image.format == "PNG":
        return any(";16" in str(told) for told in tiles)
    return image.format == "PPM" and any(isinstance(told, tuple) and told[-1] > 255 for told in tiles)


@cache
def _formats() -> list[str]:
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _unreadable(where: str, error: Exception) -> ConfigError:
    return ConfigError(f"data.source: {where} is not a readable picture: {one_line(error) or type(error).__name__}")
