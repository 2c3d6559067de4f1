"""Pictures as others keep them: MedMNIST's and Keras' arrays, split folders in any case, odd names."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from image_cases import write_pictures
from PIL import Image

from transformer_vq.config import ConfigError, DataConfig
from transformer_vq.config.images import ImageDataConfig
from transformer_vq.data import prepare
from transformer_vq.images.sources import open_corpus

GREY = np.random.default_rng(0).integers(256, size=(40, 6, 6), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(256, size=(40, 6, 6, 3), dtype=np.uint8)


def corpus(source: Path | str, **keys):
    return open_corpus(ImageDataConfig(source=str(source), **keys))


def sizes(found) -> dict[str, int]:
    return {name: len(split) for name, split in found.splits.items()}


def documents(source: Path, cache: Path) -> dict[str, list[bytes]]:
    splits = prepare(DataConfig(source=str(source), cache=str(cache))).splits
    return {k: [x.tobytes() for x in np.split(np.asarray(f.tokens), f.documents[1:])] for k, f in splits.items()}


@pytest.mark.parametrize("pixels", [GREY, COLOUR, COLOUR.transpose(0, 3, 1, 2), GREY[..., None]])
def test_medmnist(tmp_path, pixels):
    parts = {"train": slice(0, 30), "val": slice(30, 34), "test": slice(34, 40)}
    content = {f"{name}_images": pixels[part] for name, part in parts.items()}
    labels = {f"{name}_labels": np.arange(40)[part, None] % 3 for name, part in parts.items()}
    np.savez(tmp_path / "bloodmnist.npz", **content, **labels)
    found = corpus(tmp_path / "bloodmnist.npz")
    assert sizes(found) == {"train": 30, "valid": 4, "test": 6} and found.classes == 3 and not found.notes
    assert found.splits["valid"].labels.tolist() == [0, 1, 2, 0]
    read = found.splits["test"].read(np.arange(6))
    text = documents(tmp_path / "bloodmnist.npz", tmp_path / "cache")["test"]
    assert [np.repeat(x, 3 // len(x), 0).transpose(1, 2, 0).tobytes() for x in read] == text


def test_keras(tmp_path):
    np.savez(
        tmp_path / "mnist.npz", x_train=GREY[:30], y_train=np.arange(30) % 10, x_test=GREY[30:], y_test=np.arange(10)
    )
    found = corpus(tmp_path / "mnist.npz")
    assert sizes(found) == {"train": 29, "valid": 1, "test": 10} and found.classes == 10
    assert found.splits["test"].labels.tolist() == list(range(10))
    assert found.notes == ("valid is 1 of the 30 pictures of train",)
    assert len(documents(tmp_path / "mnist.npz", tmp_path / "cache")["test"]) == 10


def test_several_labels_a_picture_are_no_class_and_extra_arrays_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", train_images=GREY, train_labels=np.ones((40, 14)), extra=GREY, mean=np.zeros(3))
    found = corpus(tmp_path / "a.npz")
    assert found.classes is None and sizes(found) == {"train": 36, "valid": 2, "test": 2}
    said = "; ".join(found.notes)
    assert "left out of a.npz: extra, mean" in said and "train_labels of a.npz has 14 labels a picture" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x_train": GREY, "train_images": GREY}, "x_train and train_images are both pictures of train"),
        ({"x_train": GREY, "y_train": np.arange(39)}, r"y_train of .*a\.npz \(39,\) do not fit 40 pictures"),
        ({"x_train": GREY, "y_train": np.arange(40) - 1}, r"y_train of .*a\.npz go from -1 to 38"),
        ({"x_test": GREY}, "no pictures for train: it holds x_test"),
        ({"constraint": GREY}, "no pictures for train: it holds constraint"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, content, message):
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(ConfigError, match=message):
        corpus(tmp_path / "a.npz")


def test_a_folder_of_arrays_is_read_as_the_language_model_reads_it(tmp_path):
    (tmp_path / "p").mkdir()
    for name, part in {
        "train_data_batch_1": COLOUR[:20],
        "train_data_batch_2": COLOUR[20:36],
        "val_data": COLOUR[36:],
    }.items():
        rows = part.transpose(0, 3, 1, 2).reshape(len(part), -1)
        np.savez(tmp_path / "p" / f"{name}.npz", data=np.pad(rows, ((0, 0), (0, 0))), labels=np.arange(len(part)))
    found = corpus(tmp_path / "p")
    assert sizes(found) == {"train": 35, "valid": 1, "test": 4} and "valid serves as test" in found.notes[-1]
    assert np.array_equal(found.splits["test"].read(np.arange(4)), COLOUR[36:].transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    "names", [("Train", "Val", "TEST"), ("my-training_set", "dev2", "Testing"), ("x/train", "x/valid", "x/test")]
)
def test_split_folders_in_any_case_and_depth(tmp_path, names):
    for seed, (name, count) in enumerate(zip(names, (12, 4, 5), strict=True)):
        for label in ("cat", "dog"):
            write_pictures(tmp_path / name / label, count=count, seed=seed)
    found = corpus(tmp_path)
    assert sizes(found) == {"train": 24, "valid": 8, "test": 10} and found.classes == 2


def test_splits_inside_the_classes_and_in_the_names_of_files(tmp_path):
    for label in ("cat", "dog"):
        for seed, (name, count) in enumerate({"train": 6, "test": 3}.items()):
            write_pictures(tmp_path / "a" / label / name, count=count, seed=seed)
    found = corpus(tmp_path / "a")
    assert (
        sizes(found) == {"train": 11, "valid": 1, "test": 6}
        and found.splits["test"].labels.tolist() == [0] * 3 + [1] * 3
    )
    write_pictures(tmp_path / "b", count=20)
    for i, path in enumerate(sorted((tmp_path / "b").iterdir())):
        path.rename(path.with_name(f"{'Test' if i < 4 else 'train'}_{i:02d}.png"))
    assert sizes(corpus(tmp_path / "b")) == {"train": 15, "valid": 1, "test": 4}


def test_words_inside_words_name_no_split(tmp_path):
    for label in ("contest", "constraint", "latest"):
        write_pictures(tmp_path / label, count=20)
    found = corpus(tmp_path)
    assert sizes(found) == {"train": 54, "valid": 3, "test": 3} and found.classes == 3


def test_what_would_be_left_out_is_refused_or_named(tmp_path):
    for name in ("train", "test", "extra"):
        write_pictures(tmp_path / name, count=10)
    with pytest.raises(
        ConfigError, match=r"extra/a00\.png, .* and 5 more would be left out: the folders name test, train"
    ):
        corpus(tmp_path)
    for path in (tmp_path / "extra").iterdir():
        path.rename(tmp_path / "train" / f"more-{path.name}")
    (tmp_path / "extra").rmdir()
    (tmp_path / "labels.csv").write_text("a,b")
    found = corpus(tmp_path)
    assert sizes(found)["test"] == 10 and "left out, no pictures: labels.csv" in found.notes
    (tmp_path / "train").rename(tmp_path / "valid")
    with pytest.raises(ConfigError, match="the folders name test and valid, and no train"):
        corpus(tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    for label in ("bus", "car", "train"):
        write_pictures(tmp_path / label, count=20)
    found = corpus(tmp_path)
    assert found.classes == 3 and sizes(found) == {"train": 54, "valid": 3, "test": 3}
    assert "the folder named for train is a class among others" in found.notes


def test_a_picture_without_suffix_is_a_picture(tmp_path):
    write_pictures(tmp_path / "p", count=30)
    (tmp_path / "p" / "a00.png").rename(tmp_path / "p" / "a00")
    assert sum(sizes(corpus(tmp_path / "p")).values()) == 30


def test_odd_names(tmp_path):
    folder = write_pictures(tmp_path / "Bilder ä α |x|", count=24)
    odd = ["ü.png", "a\nb.png", "[red]x[bold].PNG", "日本.png", os.fsdecode(b"\xff\xfe.png"), " .png", "%s{0}.png"]
    for path, name in zip(sorted(folder.iterdir()), odd, strict=False):
        path.rename(folder / name)
    found = corpus(folder)
    assert sum(sizes(found).values()) == 24 and len(found.sha256) == 64
    (folder / "a\nb.png").write_bytes(b"")
    with pytest.raises(ConfigError, match="is not a readable picture") as error:
        corpus(folder)
    assert "\n" not in str(error.value)


def test_rows_of_arrays_and_of_bytes_and_what_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    features = datasets.Features(
        {
            "x": datasets.Array3D((6, 6, 3), "uint8"),
            "mask": datasets.Image(),
            "y": datasets.ClassLabel(names=["a", "b"]),
        }
    )
    for name, count in (("train", 30), ("test", 6)):
        rows = {
            "x": list(COLOUR[:count]),
            "mask": [Image.fromarray(x) for x in GREY[:count]],
            "y": [i % 2 for i in range(count)],
        }
        (tmp_path / "set").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / f"{name}-0-of-1.parquet")
    found = corpus(f"hf:{tmp_path / 'set'}")
    assert (
        np.array_equal(found.splits["test"].read(np.arange(6)), COLOUR[:6].transpose(0, 3, 1, 2)) and found.classes == 2
    )
    assert "pictures are column x; left out: mask" in found.notes
