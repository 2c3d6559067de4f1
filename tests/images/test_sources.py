from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from image_cases import write_pictures
from PIL import Image

from transformer_vq.config import ConfigError
from transformer_vq.config.images import ImageDataConfig
from transformer_vq.images import sources
from transformer_vq.images.pictures import InMemory, OnDemand
from transformer_vq.images.sources import folder as folder_module
from transformer_vq.images.sources import open_corpus
from transformer_vq.images.sources.arrays import read_idx


def corpus(source: Path | str, **keys):
    return open_corpus(ImageDataConfig(source=str(source), **keys))


def write_idx(path: Path, array: np.ndarray) -> None:
    raw = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def fashion(folder: Path, train: int = 100, test: int = 20) -> Path:
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, n in (("train", train), ("t10k", test)):
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", random.integers(256, size=(n, 28, 28), dtype=np.uint8))
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", (np.arange(n) % 10).astype(np.uint8))
    return folder


def everything(split) -> np.ndarray:
    return split.read(np.arange(len(split)))


def test_builtin_is_fashion_mnist_where_debian_puts_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FASHION_MNIST", fashion(tmp_path / "fashion-mnist"))
    found = corpus("builtin")
    assert found.name == "Fashion-MNIST" and not [n for n in found.notes if "scikit" in n]
    assert tuple(found.shape) == (1, 28, 28) and found.classes == 10
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 95, "valid": 5, "test": 20}


def test_builtin_falls_to_digits_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FASHION_MNIST", tmp_path / "absent")
    found = corpus("builtin", size=32, channels=3)
    assert "digits" in found.name and any("dataset-fashion-mnist" in note for note in found.notes)
    assert tuple(found.shape) == (3, 32, 32)
    with pytest.raises(ConfigError, match="apt-get install dataset-fashion-mnist"):
        corpus("fashion-mnist")


def test_npz_keeps_its_pixels_and_holds_out_a_twentieth_of_train(tmp_path):
    random = np.random.default_rng(1)
    train, test = (random.integers(256, size=(n, 6, 4, 3), dtype=np.uint8) for n in (80, 10))
    np.savez(tmp_path / "a.npz", train=train, test=test)
    found = corpus(tmp_path / "a.npz")
    assert tuple(found.shape) == (3, 6, 4) and found.classes is None
    assert len(found.splits["valid"]) == 4
    both = np.concatenate([everything(found.splits["train"]), everything(found.splits["valid"])])
    rows = lambda x: sorted(map(bytes, x.reshape(len(x), -1)))
    assert rows(both) == rows(train.transpose(0, 3, 1, 2))  # no picture in two splits, none lost
    assert np.array_equal(everything(found.splits["test"]), test.transpose(0, 3, 1, 2))


def test_limits_on_the_number_of_pictures(tmp_path):
    source = fashion(tmp_path / "idx", train=100, test=20)
    sizes = {name: len(split) for name, split in corpus(source).splits.items()}
    for keys in ({"max_images": 10}, {"max_eval_images": 3}, {"max_images": 10, "max_eval_images": 3}):
        found = {name: len(split) for name, split in corpus(source, **keys).splits.items()}
        most, most_eval = keys.get("max_images", 1000), keys.get("max_eval_images", 1000)
        want = {k: min(n, most, 1000 if k == "train" else most_eval) for k, n in sizes.items()}
        assert found == want


def test_folder_splits_by_path_not_by_order(tmp_path):
    one = corpus(write_pictures(tmp_path / "p", count=60))
    assert [len(one.splits[name]) for name in ("train", "valid", "test")] == [54, 3, 3]
    renamed = tmp_path / "q"
    write_pictures(renamed, count=60)
    extra = Image.new("RGB", (8, 8))
    extra.save(renamed / "zz.png")
    other = corpus(renamed)
    assert np.array_equal(everything(one.splits["test"]), everything(other.splits["test"]))


def test_folder_with_named_splits_and_classes(tmp_path):
    for split, n in (("train", 12), ("val", 4), ("test", 4)):
        for seed, label in enumerate(("cat", "dog")):
            write_pictures(tmp_path / split / label, count=n, seed=seed)
    found = corpus(tmp_path)
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 24, "valid": 8, "test": 8}
    assert found.classes == 2 and found.splits["test"].labels.tolist() == [0] * 4 + [1] * 4


def test_large_folders_are_read_on_demand_and_give_the_same(tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / "p", size=(12, 9))
    whole = corpus(folder, size=8)
    monkeypatch.setattr(folder_module, "IN_MEMORY", 100)
    lazy = corpus(folder, size=8)
    assert isinstance(whole.splits["train"].whole, InMemory) and isinstance(lazy.splits["train"].whole, OnDemand)
    for name in whole.splits:
        assert np.array_equal(everything(whole.splits[name]), everything(lazy.splits[name]))


def test_resize_keeps_the_centre(tmp_path):
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 255
    for i in range(20):
        (tmp_path / "p").mkdir(exist_ok=True)
        Image.fromarray(wide).save(tmp_path / "p" / f"{i}.png")
    assert (everything(corpus(tmp_path / "p", size=8).splits["train"]) == 255).all()


def test_hub_datasets_from_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    pictures = [Image.fromarray(np.full((8, 8, 3), i, np.uint8)) for i in range(40)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"img": pictures, "label": [i % 2 for i in range(40)]}, features=features)
    (tmp_path / "set").mkdir()
    rows.to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    found = corpus(f"hf:{tmp_path / 'set'}")
    assert tuple(found.shape) == (3, 8, 8) and found.classes == 2
    assert sum(len(split) for split in found.splits.values()) == 40


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "a05.png").write_bytes(b"not a picture"), r"a05\.png is not a readable picture"),
        (lambda p: Image.new("RGB", (9, 8)).save(p / "a05.png"), r"differ in size, a00\.png has 8x8 and a05\.png 8x9"),
        (lambda p: Image.new("L", (8, 8)).save(p / "a05.png"), r"a05\.png is grey and a00\.png is in colour"),
        (lambda p: Image.new("I;16", (8, 8)).save(p / "a05.png"), r"a05\.png has pixels of mode I;16"),
        (lambda p: [f.unlink() for f in p.iterdir()], "no pictures there"),
        (lambda p: [f.unlink() for f in list(p.iterdir())[1:]], "no picture is left for the train split"),
    ],
)  # fmt: skip
def test_bad_folders_are_one_clear_line(tmp_path, spoil, message):
    folder = write_pictures(tmp_path / "p")
    spoil(folder)
    with pytest.raises(ConfigError, match=message) as error:
        corpus(folder)
    assert "\n" not in str(error.value)


def test_a_picture_cut_short_is_named(tmp_path):
    folder = write_pictures(tmp_path / "p", size=(64, 64))
    raw = (folder / "a07.png").read_bytes()
    (folder / "a07.png").write_bytes(raw[: len(raw) // 2])  # the header is whole
    with pytest.raises(ConfigError, match=r"a07\.png is not a readable picture"):
        corpus(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npz", {"train": np.zeros((4, 8, 8), np.float32)}, "array train of .* is float32"),
        ("a.npz", {"train": np.zeros((4, 8, 8, 5), np.uint8)}, r"is uint8 \(4, 8, 8, 5\); pictures are uint8"),
        (
            "a.npz",
            {"pictures": np.zeros((4, 8, 8), np.uint8)},
            "it holds pictures; arrays named train",
        ),
        ("a.npz", {"train": np.zeros((4, 8, 8), np.uint8), "train_labels": np.zeros(3)}, "train_labels"),
    ],
)
def test_bad_arrays(tmp_path, name, content, message):
    np.savez(tmp_path / name, **content)
    with pytest.raises(ConfigError, match=message):
        corpus(tmp_path / name)


def test_other_bad_sources(tmp_path):
    (tmp_path / "b.npz").write_bytes(b"PK nothing")
    for source, message in ((tmp_path / "b.npz", "not readable as .npz"), (tmp_path / "nowhere", "no such folder")):
        with pytest.raises(ConfigError, match=message):
            corpus(source)
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((3, 4, 4), np.uint8))
    raw = (tmp_path / "train-images-idx3-ubyte").read_bytes()
    assert read_idx(tmp_path / "train-images-idx3-ubyte").shape == (3, 4, 4)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(raw[:-1])
    with pytest.raises(ConfigError, match="not a whole idx file"):
        read_idx(tmp_path / "train-images-idx3-ubyte")
