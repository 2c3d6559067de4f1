"""One reader: the same picture has the same pixels for the image benchmark and for the language model."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image, ImageCms

from transformer_vq.config import ConfigError, DataConfig
from transformer_vq.config.images import ImageDataConfig
from transformer_vq.data import prepare
from transformer_vq.data.pictures import header, is_picture, open_picture
from transformer_vq.images.sources import open_corpus

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(256, size=(6, 4), dtype=np.uint8)
COLOUR = RANDOM.integers(256, size=(6, 4, 3), dtype=np.uint8)
ALPHA = np.tile(np.array([0, 85, 170, 255], np.uint8), (6, 1))
TURNED = {  # what EXIF says -> how the stored rows are made of an upright picture
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(raw: bytes) -> np.ndarray:
    return np.asarray(open_picture(raw, "a"))


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return (colour * (alpha / 255.0) + 255 * (1 - alpha / 255.0)).round()


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_a_picture_stands_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(TURNED[orientation](COLOUR)))
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    raw = saved(stored, kind, exif=exif, **options)
    assert np.abs(pixels(raw).astype(int) - COLOUR).max() <= (3 if kind == "JPEG" else 0)
    assert header(raw, "a") == (3, (4, 6))


def deep_png(channels: int) -> bytes:
    """A PNG of 16 bits a channel, which PIL cannot write in colour."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    about = struct.pack(">IIBBBBB", 4, 6, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + bytes(8 * channels) for _ in range(6))
    parts = [(b"IHDR", about), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def palette(**info) -> Image.Image:
    image = Image.fromarray((GREY % 4).astype(np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 8, 7])
    image.info.update(info)
    return image


PALETTE = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]], np.uint8)[GREY % 4]
SHOWN = {
    "grey": (saved(Image.fromarray(GREY)), GREY),
    "colour": (saved(Image.fromarray(COLOUR)), COLOUR),
    "one bit": (saved(Image.fromarray(GREY > 99)), np.where(GREY > 99, 255, 0)),
    "four bits": (b"P5\n4 6\n15\n" + (GREY % 16).tobytes(), (GREY % 16) * 17),
    "grey and alpha": (saved(Image.fromarray(np.dstack([GREY, ALPHA]))), over_white(GREY, ALPHA)),
    "colour and alpha": (
        saved(Image.fromarray(np.dstack([COLOUR, ALPHA]))),
        over_white(COLOUR, ALPHA[..., None]),
    ),
    "palette": (saved(palette()), PALETTE),
    "one transparent entry": (
        saved(palette(), transparency=1),
        np.where((GREY % 4 == 1)[..., None], 255, PALETTE),
    ),
    "alpha of a palette": (
        saved(palette(), transparency=bytes([255, 0, 85, 255])),
        over_white(PALETTE, np.array([255, 0, 85, 255])[GREY % 4][..., None]),
    ),
    "a transparent grey": (saved(Image.fromarray(GREY % 4), transparency=2), np.where(GREY % 4 == 2, 255, GREY % 4)),
    "a transparent GIF": (saved(palette(), "GIF", transparency=1), np.where((GREY % 4 == 1)[..., None], 255, PALETTE)),
    "CMYK": (saved(Image.fromarray(COLOUR).convert("CMYK"), "TIFF"), COLOUR),
    "alpha on its side": (
        saved(
            Image.fromarray(np.ascontiguousarray(np.rot90(np.dstack([COLOUR, ALPHA])))),
            exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0",
        ),
        over_white(COLOUR, ALPHA[..., None]),
    ),
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_a_picture_means_is_what_is_read(name):
    raw, want = SHOWN[name]
    got = pixels(raw)
    assert got.dtype == np.uint8 and got.shape == want.shape
    assert np.abs(got.astype(int) - want).max() <= (1 if "alpha" in name else 0)
    assert header(raw, "a").channels == (1 if want.ndim == 2 else 3)
    assert np.array_equal(np.asarray(open_picture(Image.open(io.BytesIO(raw)), "a")), got)


def frames(kind: str) -> bytes:
    return saved(Image.fromarray(COLOUR), kind, save_all=True, append_images=[Image.fromarray(255 - COLOUR)])


def lab() -> bytes:
    space = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    return saved(ImageCms.profileToProfile(Image.fromarray(COLOUR), *space, outputMode="LAB"), "TIFF")


REFUSED = {
    "16 bits of grey.png": (saved(Image.fromarray(GREY.astype(np.uint16) * 257)), "mode I;16"),
    "16 bits of colour.png": (deep_png(3), "more than 8 bits a channel"),
    "16 bits and alpha.png": (deep_png(2), "more than 8 bits a channel"),
    "16 bits.tif": (saved(Image.fromarray(GREY.astype(np.uint16)), "TIFF"), "mode I;16"),
    "floats.tif": (saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "mode F"),
    "16 bits of colour.ppm": (b"P6\n4 6\n65535\n" + bytes(144), "more than 8 bits a channel"),
    "16 bits of grey.pgm": (b"P5\n4 6\n65535\n" + bytes(48), "pixels of mode I"),
    "lab.tif": (lab(), "mode LAB"),
    "moves.gif": (frames("GIF"), "holds 2 frames"),
    "moves.png": (frames("PNG"), "holds 2 frames"),
    "moves.webp": (frames("WEBP"), "holds 2 frames"),
    "pages.tif": (frames("TIFF"), "holds 2 frames"),
    "page.html": (b"<html>", "is not a readable picture"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shown_truly_is_refused_by_name(tmp_path, name):
    raw, message = REFUSED[name]
    (tmp_path / name).write_bytes(raw)
    for read in (open_picture, header):
        with pytest.raises(ConfigError, match=message) as error:
            read(tmp_path / name, str(tmp_path / name))
        assert name in str(error.value) and "\n" not in str(error.value)


def test_a_phones_picture_is_the_first_of_its_file():
    first, preview = Image.fromarray(COLOUR), Image.fromarray(COLOUR[:2, :2])
    raw = saved(first, "MPO", save_all=True, append_images=[preview], quality=100, subsampling=0)
    assert np.array_equal(pixels(raw), pixels(saved(first, "JPEG", quality=100, subsampling=0)))


def test_a_flipped_bit_in_the_pixels_of_a_png_is_noticed():
    raw = bytearray(SHOWN["colour"][0])
    raw[raw.index(b"IDAT") + 20] ^= 1
    with pytest.raises(ConfigError, match="is not a readable picture"):
        open_picture(bytes(raw), "a.png")


def test_pictures_are_known_by_content_too(tmp_path):
    (tmp_path / "a").write_bytes(SHOWN["grey"][0])
    (tmp_path / "notes.txt").write_text("P1 of the plan: BM, GIF89a")
    assert is_picture(tmp_path / "a") and not is_picture(tmp_path / "notes.txt")


def test_both_ways_read_the_same_pixels(tmp_path, monkeypatch):
    """Every kind of picture, as files and as rows: the benchmark's arrays are the language model's bytes."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    content: dict[str, bytes] = {name: raw for name, (raw, _) in SHOWN.items()}
    for orientation, turn in TURNED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        content[f"turned {orientation}"] = saved(Image.fromarray(np.ascontiguousarray(turn(COLOUR))), "JPEG", exif=exif)
    rows = list(content.values()) * 3
    for split, part in {"train": rows, "validation": rows[:3], "test": rows[:3]}.items():
        (tmp_path / "files" / split).mkdir(parents=True)
        for i, raw in enumerate(part):
            suffix = (Image.open(io.BytesIO(raw)).format or "").lower()
            (tmp_path / "files" / split / f"{i:03d}.{suffix}").write_bytes(raw)
        features = datasets.Features({"image": datasets.Image()})
        table = {"image": [{"bytes": raw, "path": None} for raw in part]}
        (tmp_path / "rows").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "rows" / f"{split}-0-of-1.parquet")

    def benchmark(source: str) -> list[bytes]:
        split = open_corpus(ImageDataConfig(source=source, channels=3)).splits["train"]
        return [x.transpose(1, 2, 0).tobytes() for x in split.read(np.arange(len(split)))]

    def text(source: str, streaming: bool) -> list[bytes]:
        keys = {"source": source, "field": "image", "cache": str(tmp_path / "cache"), "streaming": streaming}
        split = prepare(DataConfig(**keys)).splits["train"]
        return [part.tobytes() for part in np.split(np.asarray(split.tokens), split.documents[1:])]

    want = [np.asarray(open_picture(raw, "a").convert("RGB")).tobytes() for raw in rows]
    files, table = tmp_path / "files", tmp_path / "rows"
    assert benchmark(str(files)) == want and benchmark(f"hf:{files}") == want and benchmark(f"hf:{table}") == want
    for streaming in (False, True):
        assert text(f"hf:{files}", streaming) == want and text(f"hf:{table}", streaming) == want


def test_a_file_out_of_reach_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.png is not a readable picture: .*No such file"):
        open_picture(Path(tmp_path / "gone.png"), str(tmp_path / "gone.png"))
