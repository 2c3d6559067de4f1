"""A flipped byte in a file of any kind: the same data, or one line that names the file; never another exception."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transformer_vq.config import ConfigError, DataConfig
from transformer_vq.config.images import ImageDataConfig
from transformer_vq.data.arrays import classes_of, find_arrays, read_arrays
from transformer_vq.data.npz import array_names, read_array
from transformer_vq.data.pictures import header, open_picture
from transformer_vq.images.sources import open_corpus
from transformer_vq.images.sources.arrays import read_idx

PIXELS = np.random.default_rng(0).integers(256, size=(30, 4, 4, 3), dtype=np.uint8)


def npz(compress: bool) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(file, train=PIXELS, train_labels=np.arange(30)[:, None] % 3)
    return file.getvalue()


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.repeat(np.repeat(PIXELS[0], 4, 0), 4, 1)).save(file, kind)
    return file.getvalue()


def read_npz(path: Path) -> bytes:
    corpus = open_corpus(ImageDataConfig(source=str(path)))
    labels = [split.labels.tobytes() for split in corpus.splits.values()]
    return b"".join([*(split.read(np.arange(len(split))).tobytes() for split in corpus.splits.values()), *labels])


def read_npz_as_text(path: Path) -> bytes:
    return b"".join(piece.text for piece in read_arrays(find_arrays(path).places["train"], DataConfig()))


def read_picture(path: Path) -> bytes:
    header(path, str(path))
    return open_picture(path, str(path)).tobytes()


KINDS: dict[str, tuple[bytes, Callable[[Path], bytes], bool]] = {  # content, reader, whether checksums cover the data
    "a.npz": (npz(False), read_npz, True),
    "b.npz": (npz(True), read_npz, True),
    "c.npz": (npz(True), read_npz_as_text, True),
    "train-images-idx3-ubyte.gz": (gzip.compress(idx(PIXELS[..., 0])), lambda p: read_idx(p).tobytes(), True),
    "train-images-idx3-ubyte": (idx(PIXELS[..., 0]), lambda p: read_idx(p).tobytes(), False),
    "a.png": (picture("PNG"), read_picture, True),
    **{f"a.{kind.lower()}": (picture(kind), read_picture, False) for kind in ("JPEG", "GIF", "BMP", "TIFF", "WEBP")},
    "a.ppm": (picture("PPM"), read_picture, False),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:Image size:PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", KINDS)
def test_damage_is_one_line_or_no_matter(tmp_path, name):
    raw, read, covered = KINDS[name]
    path = tmp_path / name
    path.write_bytes(raw)
    want = read(path)
    random = np.random.default_rng(sum(map(ord, name)))
    ends = min(len(raw), 40)  # headers and directories are small, and most can go wrong there
    places = [*range(0, ends, 2), *range(len(raw) - ends, len(raw), 2), *random.integers(len(raw), size=40)]
    damaged = [raw[:at] + bytes([raw[at] ^ (1 << int(random.integers(8)))]) + raw[at + 1 :] for at in places]
    damaged += [raw[: int(at)] for at in random.integers(len(raw), size=8)]
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            got = read(path)
        except ConfigError as error:
            refused += 1
            assert name in str(error) and "\n" not in str(error)
        else:
            assert got == want or not covered, f"{name}: other data, and no complaint"
    assert refused >= (len(damaged) // 3 if covered else 8)


def test_a_header_that_says_less_than_there_is(tmp_path):
    """numpy would give fewer rows and never reach the checksum."""
    file = io.BytesIO()
    np.savez(file, train=np.tile(PIXELS, (30, 1, 1, 1)))
    raw = file.getvalue().replace(b"(900, 4, 4, 3)", b"(100, 4, 4, 3)")
    (tmp_path / "a.npz").write_bytes(raw)
    assert len(np.load(tmp_path / "a.npz")["train"]) == 100
    with pytest.raises(ConfigError, match=r"array train of .*a\.npz is not readable: Bad CRC-32"):
        read_array(tmp_path / "a.npz", "train")


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", train=np.array([{}], object))
    assert array_names(tmp_path / "a.npz") == ["train"]
    with pytest.raises(ConfigError, match="pickled Python objects"):
        read_array(tmp_path / "a.npz", "train")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    "array", [np.zeros((0, 3)), np.float64(3.5), PIXELS, np.arange(5, dtype=">i2"), np.array(["é"])]
)
def test_arrays_come_back_as_numpy_has_them(tmp_path, array, order):
    np.savez_compressed(tmp_path / "a.npz", x=np.asarray(array, order=order))
    got, want = read_array(tmp_path / "a.npz", "x"), np.load(tmp_path / "a.npz")["x"]
    assert got.dtype == want.dtype and np.array_equal(got, want)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([[0], [1], [2]], np.uint8), None),
        (np.array([0.0, 1.0, 2.0]), None),
        (np.array([True, False, True]), None),
        (np.array([0, -1, 2]), "go from -1 to 2"),
        (np.array([0, 1, 1 << 40]), "labels are from 0 to 65535"),
        (np.array([0, 1.5, 2]), "whole numbers from 0 on"),
        (np.array([0, np.nan, 2]), "whole numbers from 0 on"),
        (np.array(["a", "b", "c"]), "whole numbers from 0 on"),
        (np.array([0, 1]), r"\(2,\) do not fit 3 pictures"),
        (np.array([0, 1, 2, 3]), r"\(4,\) do not fit 3 pictures"),
        (np.zeros((1, 3)), r"\(1, 3\) do not fit 3 pictures"),
    ],
)
def test_labels(labels, message):
    if message is None:
        assert classes_of(labels, 3, "x").tolist() == labels.reshape(-1).astype(int).tolist()
        return
    with pytest.raises(ConfigError, match=message) as error:
        classes_of(labels, 3, "array y_train of a.npz")
    assert "y_train of a.npz" in str(error.value)
