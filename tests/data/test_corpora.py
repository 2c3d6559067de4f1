import ast
import hashlib
import lzma
import os
from itertools import combinations

import pytest

from transformer_vq.config import ConfigError, DataConfig
from transformer_vq.data.corpora import open_source
from transformer_vq.data.documents import SPLITS


def opened(source, border="byte"):
    return open_source(DataConfig(source=str(source)), border)


def texts(source):
    """Text of each split."""
    return {name: b"".join(piece.text for piece in source.splits[name]()) for name in SPLITS}


def files(source):
    """Files behind each split, in order."""
    return {name: list(dict.fromkeys(piece.where for piece in source.splits[name]())) for name in SPLITS}


@pytest.fixture
def folder(tmp_path):
    """A folder with files of the given names, each holding its own name a hundred times."""

    def make(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{name}\n" * 100)
        return tmp_path

    return make


def test_builtin_is_the_source_of_python_split_by_file():
    source = opened("builtin")
    where, text = files(source), texts(source)
    for a, b in combinations(SPLITS, 2):
        assert not set(where[a]) & set(where[b])
    total = sum(len(t) for t in text.values())
    assert total > 4_000_000
    assert 0.88 < len(text["train"]) / total < 0.92
    assert 0.03 < len(text["valid"]) / total < 0.07
    assert 0.03 < len(text["test"]) / total < 0.07


def test_builtin_is_real_text_without_tests_and_tables():
    source = opened("builtin")
    paths = [path for split in files(source).values() for path in split]
    assert all(path.endswith(".py") for path in paths)
    for part in ("/test/", "/tests/", "/idle_test/", "-packages/", "/encodings/", "topics.py", "__pycache__"):
        assert not [path for path in paths if part in path]
    names = {os.path.basename(path) for path in paths}
    assert {"argparse.py", "dataclasses.py", "inspect.py"} <= names
    for path in paths[::10]:
        with open(path, encoding="utf-8") as file:
            ast.parse(file.read())
    for text in texts(source).values():
        text.decode("utf-8")


def test_builtin_is_the_same_each_time():
    a, b = opened("builtin"), opened("builtin")
    assert a.fingerprint == b.fingerprint
    assert files(a) == files(b)


def test_a_file_is_split_by_position(tmp_path):
    content = os.urandom(10_001)
    (tmp_path / "blob").write_bytes(content)
    text = texts(opened(tmp_path / "blob"))
    assert (text["train"], text["valid"], text["test"]) == (content[:9000], content[9000:9500], content[9500:])


def test_a_compressed_file_is_split_like_the_plain_one(tmp_path):
    content = b"some words in lines\n" * 1000
    (tmp_path / "plain.txt").write_bytes(content)
    (tmp_path / "packed.txt.xz").write_bytes(lzma.compress(content))
    assert texts(opened(tmp_path / "packed.txt.xz")) == texts(opened(tmp_path / "plain.txt"))


def test_borders_respect_characters_only_when_text_is_read(tmp_path):
    (tmp_path / "euro.txt").write_text("€" * 1001, encoding="utf-8")
    assert len(texts(opened(tmp_path / "euro.txt", "byte"))["train"]) == 3003 * 90 // 100
    for text in texts(opened(tmp_path / "euro.txt", "character")).values():
        assert set(text.decode()) == {"€"}


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "valid.txt", "test.txt"),
        ("my_train_00.txt", "my_train_01.txt", "my-val.txt", "my_test.txt"),
        ("train/1.txt", "train/2.txt", "validation/1_test.txt", "test/train.txt"),
        ("corpus-Train.TXT", "corpus-Valid.TXT", "corpus-Test.TXT"),
    ],
)
def test_files_named_after_splits_are_those(folder, names):
    source = opened(folder(*names))
    for split, paths in files(source).items():
        short = "val" if split == "valid" else split
        want = sorted(n for n in names if n.lower().startswith(short) or (short in n.lower() and "/" not in n))
        assert [os.path.relpath(path, folder()) for path in paths] == want


def test_a_split_without_a_file_is_carved_off_train_and_said(folder):
    source = opened(folder("train.txt", "test.txt"))
    text = texts(source)
    assert text["train"] + text["valid"] == b"train.txt\n" * 100
    assert len(text["valid"]) == 50
    assert text["test"] == b"test.txt\n" * 100
    assert any("valid carved off the end of train" in note for note in source.notes)


def test_files_that_name_no_split_are_said_to_be_left_out(folder):
    source = opened(folder("train.txt", "valid.txt", "test.txt", "interval.txt", "notes.md"))
    assert any("2 of 5 files left out" in note for note in source.notes)


def test_other_folders_are_split_by_a_hash_of_the_path(folder):
    names = [f"chapter{i}/{j}.txt" for i in range(20) for j in range(10)]
    source = opened(folder(*names))
    where = files(source)
    in_order = [path for split in SPLITS for path in where[split]]
    relative = [os.path.relpath(path, folder()) for path in in_order]
    assert sorted(relative) == sorted(names)
    assert relative == sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    sizes = {split: len(text) for split, text in texts(source).items()}
    assert abs(sizes["train"] / sum(sizes.values()) - 0.9) < 0.01
    assert abs(sizes["test"] / sum(sizes.values()) - 0.05) < 0.01


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_no_split_of_a_small_folder_is_empty(folder, count):
    names = [f"{i}.txt" for i in range(count)]
    source = opened(folder(*names))
    text = texts(source)
    assert all(text.values())
    assert sum(map(len, text.values())) == sum(len(name) + 1 for name in names) * 100


def test_a_folder_with_enwik8_is_that_file_split_by_position(folder):
    root = folder("readme.txt", "other.txt", "more.txt")
    (root / "enwik8").write_bytes(b"0123456789" * 100)
    text = texts(opened(root))
    assert [len(text[name]) for name in SPLITS] == [900, 50, 50]


def test_hidden_files_are_left_alone(folder):
    root = folder("a.txt", ".git/config", ".hidden", "b.txt", "c.txt")
    assert {os.path.basename(path) for split in files(opened(root)).values() for path in split} == {
        "a.txt",
        "b.txt",
        "c.txt",
    }


def test_the_fingerprint_follows_content_and_names_not_the_place(tmp_path):
    def make(where, content, name="a.txt"):
        (tmp_path / where).mkdir()
        for n in (name, "b.txt", "c.txt"):
            (tmp_path / where / n).write_text(content if n == name else "x")
        return opened(tmp_path / where).fingerprint

    first = make("one", "hello")
    assert make("two", "hello") == first
    assert make("three", "hellO") != first
    assert make("four", "hello", "d.txt") != first


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "none.txt", "no such file or folder"),
        (lambda p: "bultin", "did you mean builtin"),
        (lambda p: (p / "empty.txt").write_bytes(b"") or p / "empty.txt", "the file is empty"),
        (lambda p: p, "the folder holds no text"),
        (lambda p: (p / "e.txt").write_bytes(b"") or p, "the folder holds no text"),
        (lambda p: (p / "rows.parquet").write_bytes(b"PAR1") and p / "rows.parquet", "are read with hf:"),
        (lambda p: (p / "rows.parquet").write_bytes(b"PAR1") and p, "are read with hf:"),
    ],
)
def test_what_is_not_there_is_one_line(tmp_path, make, message):
    with pytest.raises(ConfigError, match=message) as error:
        opened(make(tmp_path))
    assert str(error.value).startswith("data.source")
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_opened_is_one_line(folder, monkeypatch):
    path = folder("a.txt") / "a.txt"

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(ConfigError, match=r"a\.txt is not readable: .*Permission denied"):
        opened(path)
