"""Pictures as bytes, from a folder, from parquet and from arrays, each a document."""

from __future__ import annotations

import io

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from transformer_vq.config import ConfigError, DataConfig
from transformer_vq.data import prepare
from transformer_vq.data.pixels import pixel_bytes

PIXELS = np.random.default_rng(0).integers(256, size=(20, 4, 4, 3), dtype=np.uint8)
MANY = np.random.default_rng(1).integers(256, size=(50, 4, 4, 3), dtype=np.uint8)


def corpus(source, tmp_path, **keys):
    config = {"source": f"hf:{source}", "field": "image", "cache": str(tmp_path / "cache"), **keys}
    return prepare(DataConfig(**config))


def pictures(split):
    """The documents of a split."""
    return [part.tobytes() for part in np.split(np.asarray(split.tokens), split.documents[1:])]


def test_a_folder_of_pictures_is_a_document_each(tmp_path):
    for split, rows in {"train": range(16), "validation": range(16, 18), "test": range(18, 20)}.items():
        (tmp_path / "p" / split).mkdir(parents=True)
        for i in rows:
            Image.fromarray(PIXELS[i]).save(tmp_path / "p" / split / f"{i:02d}.png")
    found = corpus(tmp_path / "p", tmp_path)
    assert pictures(found.splits["train"]) == [PIXELS[i].tobytes() for i in range(16)]
    assert pictures(found.splits["valid"]) + pictures(found.splits["test"]) == [x.tobytes() for x in PIXELS[16:]]


@pytest.mark.parametrize("typed", [True, False])
def test_parquet_as_the_hub_holds_it(tmp_path, typed):
    def encoded(x):
        file = io.BytesIO()
        Image.fromarray(x).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    (tmp_path / "p").mkdir()
    features = '{"info": {"features": {"image": {"_type": "Image"}}}}'
    for name, rows in {"train": PIXELS[:16], "validation": PIXELS[16:18], "test": PIXELS[18:]}.items():
        table = pa.table({"image": [encoded(x) for x in rows]})
        if typed:
            table = table.replace_schema_metadata({"huggingface": features})
        pq.write_table(table, tmp_path / "p" / f"{name}-00000-of-00001.parquet")
    found = corpus(tmp_path / "p", tmp_path)
    assert pictures(found.splits["train"]) == [x.tobytes() for x in PIXELS[:16]]
    smaller = corpus(tmp_path / "p", tmp_path, image_size=2)
    assert smaller.folder != found.folder and len(smaller.splits["train"]) == 16 * 12


@pytest.mark.parametrize("streaming", [False, True])
def test_arrays_in_parquet(tmp_path, streaming):
    """As the hub holds the official downsampled ImageNet; what is missing is carved without cutting a picture."""
    (tmp_path / "p").mkdir()
    features = datasets.Features({"image": datasets.Array3D((4, 4, 3), "uint8"), "label": datasets.Value("int32")})
    for name, rows in {"train": MANY[:48], "validation": MANY[48:]}.items():
        part = datasets.Dataset.from_dict({"image": rows, "label": [0] * len(rows)}, features=features)
        part.to_parquet(tmp_path / "p" / f"{name}-00000-of-00001.parquet")
    found = corpus(tmp_path / "p", tmp_path, image_size=4, streaming=streaming)
    assert pictures(found.splits["valid"]) == [x.tobytes() for x in MANY[48:]]
    whole = pictures(found.splits["train"]) + pictures(found.splits["test"])
    assert whole == [x.tobytes() for x in MANY[:48]]
    fewer = corpus(tmp_path / "p", tmp_path, image_size=4, streaming=streaming, max_bytes=40 * 48 - 1)
    assert pictures(fewer.splits["train"]) + pictures(fewer.splits["test"]) == whole[:40]


def test_arrays_in_a_file(tmp_path):
    np.savez(tmp_path / "p.npz", train=MANY[:48], test=MANY[48:], about=np.zeros(3))
    found = prepare(DataConfig(source=str(tmp_path / "p.npz"), cache=str(tmp_path / "cache")))
    assert pictures(found.splits["train"]) + pictures(found.splits["valid"]) == [x.tobytes() for x in MANY[:48]]
    assert pictures(found.splits["test"]) == [x.tobytes() for x in MANY[48:]]
    assert [found.splits["train"].words, found.splits["train"].head(100).words] == [0, 0]  # pixels are no words
    smaller = prepare(DataConfig(source=str(tmp_path / "p.npz"), cache=str(tmp_path / "cache"), image_size=2))
    assert pictures(smaller.splits["test"])[0] == pixel_bytes(Image.fromarray(MANY[48]), 2)
    np.savez(tmp_path / "p.npz", train=MANY[::-1, :, :, 0])
    grey = prepare(DataConfig(source=str(tmp_path / "p.npz"), cache=str(tmp_path / "cache")))
    assert pictures(grey.splits["train"])[0] == np.repeat(MANY[-1, :, :, :1], 3, -1).tobytes()


def test_a_folder_of_the_official_arrays(tmp_path):
    """Several files for train, one for valid, each of rows of all red, all green, all blue."""
    (tmp_path / "p").mkdir()
    parts = {"train_data_batch_1": MANY[:20], "train_data_batch_2": MANY[20:48], "val_data": MANY[48:]}
    for name, rows in parts.items():
        data = rows.transpose(0, 3, 1, 2).reshape(len(rows), -1)
        np.savez(tmp_path / "p" / f"{name}.npz", data=data, labels=np.arange(len(rows)), mean=data.mean(0))
    found = prepare(DataConfig(source=str(tmp_path / "p"), cache=str(tmp_path / "cache"), image_size=4))
    assert pictures(found.splits["valid"]) == [x.tobytes() for x in MANY[48:]]
    whole = pictures(found.splits["train"]) + pictures(found.splits["test"])
    assert whole == [x.tobytes() for x in MANY[:48]]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": PIXELS}, "no pictures for train: it holds pictures; arrays named train, valid, test"),
        ({"train": PIXELS / 255}, r"array train of .* is float64 \(20, 4, 4, 3\); pictures are uint8"),
        ({"train": PIXELS.reshape(20, -1)[:, :47]}, r"is uint8 \(20, 47\)"),
        ({"train": PIXELS.astype(object)}, "array train of .* is not readable"),
        (None, "is not readable as .npz"),
    ],
)
def test_arrays_that_are_no_pictures_are_one_line(tmp_path, arrays, message):
    if arrays is None:
        (tmp_path / "p.npz").write_bytes(b"no archive")
    else:
        np.savez(tmp_path / "p.npz", **arrays)
    with pytest.raises(ConfigError, match=message) as error:
        prepare(DataConfig(source=str(tmp_path / "p.npz"), cache=str(tmp_path / "cache")))
    assert "\n" not in str(error.value)


def test_pictures_are_not_read_as_text(tmp_path):
    Image.fromarray(PIXELS[0]).save(tmp_path / "0.png")
    with pytest.raises(ConfigError, match=r"data\.image_size = 4: .* is read as text; pictures are named hf:"):
        prepare(DataConfig(source=str(tmp_path), cache=str(tmp_path / "cache"), image_size=4))


def test_resizing_takes_the_centre_and_means_of_boxes():
    wide = np.zeros((4, 8, 3), dtype=np.uint8)
    wide[:, 2:6] = PIXELS[0]
    want = PIXELS[0].reshape(2, 2, 2, 2, 3).mean((1, 3))
    got = np.frombuffer(pixel_bytes(Image.fromarray(wide), 2), np.uint8).reshape(2, 2, 3)
    assert np.abs(got - want).max() <= 1  # rounded along one side, then the other
    assert pixel_bytes(Image.fromarray(PIXELS[0]), 4) == PIXELS[0].tobytes()
    grey = Image.fromarray(PIXELS[0, :, :, 0])
    assert pixel_bytes(grey, None) == np.repeat(PIXELS[0, :, :, :1], 3, -1).tobytes()


def test_a_damaged_picture_is_one_line(tmp_path):
    pq.write_table(pa.table({"image": [{"bytes": b"none", "path": "x.png"}] * 50}), tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match=r"row 0 of train \(x\.png\) is not a readable picture") as error:
        corpus(tmp_path / "rows.parquet", tmp_path)
    assert "\n" not in str(error.value)


def test_a_column_of_labels_is_no_picture(tmp_path):
    pq.write_table(pa.table({"image": list(range(100))}), tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match="row 0 of train holds int, not text"):
        corpus(tmp_path / "rows.parquet", tmp_path)
