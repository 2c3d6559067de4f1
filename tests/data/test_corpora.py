import ast
import hashlib
import io
import lzma
import os
import re
import tarfile
import zipfile
from itertools import combinations
from pathlib import Path

import pytest

from transformer_vq.config import ConfigError, DataConfig
from transformer_vq.data import prepare
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
    content = bytes(range(256)).translate(None, bytes(range(32))) * 45  # Latin-1, not UTF-8
    content = content[:10_001]
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


def test_files_that_name_no_split_beside_those_that_do_are_named(folder):
    names = ("train.txt", "valid.txt", "test.txt", "README.md", "LICENSE")
    assert any("left out: LICENSE, README.md" in note for note in opened(folder(*names)).notes)
    with pytest.raises(ConfigError, match=r"2 of 7 files name no split, where others .*: interval\.txt, notes\.md"):
        opened(folder("interval.txt", "notes.md"))


def test_split_names_are_whole_words(folder):
    """datasets issue 5021: constraint.txt holds `train`, latest.txt `test`."""
    names = ["constraint.txt", "latest.txt", *(f"chapter{i}.txt" for i in range(1, 5))]
    source = opened(folder(*names))
    read = b"".join(texts(source).values())
    assert all(read.count(name.encode()) == 100 for name in names)
    assert "by position" in " ".join(source.measured())


def test_a_name_of_test_without_one_of_train_is_said(folder):
    source = opened(folder("a.txt", "b.txt", "tests/c.txt", "my_test.txt"))
    assert any(note.startswith("my_test.txt: split as all others") for note in source.notes)


def test_train_and_test_folders_at_any_depth(folder):
    where = files(opened(folder("corpus/Train/a.txt", "corpus/Train/b.txt", "corpus/Test/c.txt", "corpus/dev/d.txt")))
    assert {k: [os.path.basename(p) for p in v] for k, v in where.items()} == {
        "train": ["a.txt", "b.txt"],
        "valid": ["d.txt"],
        "test": ["c.txt"],
    }


def test_one_long_file_and_short_ones_are_cut_by_position(tmp_path):
    """lingua issue 61: whole files would be 18 bytes of train and 60,894 of test."""
    long = "".join(f"{i}\n" for i in range(1, 12001)).encode()
    (tmp_path / "b.txt").write_bytes(long)
    for i in range(1, 5):
        (tmp_path / f"s{i}.txt").write_text("word\n")
    source = opened(tmp_path)
    lengths = [len(text) for text in texts(source).values()]
    assert sum(lengths) == len(long) + 20
    assert [round(100 * n / sum(lengths), 2) for n in lengths] == [90, 5, 5]
    assert "split 90/5/5 by position: whole ones would be" in source.measured()[0]


def test_a_file_too_long_for_valid_and_test_is_train(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text("x" * (4000 if i == 7 else 100))
    source = opened(tmp_path)
    lengths = [len(text) for text in texts(source).values()]
    got = [float(share) for share in re.search(r"split ([\d.]+)/([\d.]+)/([\d.]+)$", source.measured()[0]).groups()]
    assert got == [round(100 * n / sum(lengths), 2) for n in lengths]
    assert all(2.5 <= share <= 10 for share in got[1:])
    assert any(path.endswith("/7.txt") for path in files(source)["train"])


def test_the_note_says_the_shares_that_came_out_of_packed_files(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.txt.xz").write_bytes(lzma.compress(b"some words\n" * (100 + i)))
    source = opened(tmp_path)
    lengths = [len(text) for text in texts(source).values()]
    want = "/".join(f"{round(100 * n / sum(lengths), 2):g}" for n in lengths)
    assert source.measured()[0].endswith(f"split {want}")


def test_what_is_no_text_never_becomes_text(folder):
    root = folder(*(f"{i}.txt" for i in range(12)))
    (root / "model.pt").write_bytes(os.urandom(5000))
    with pytest.raises(ConfigError, match=r"model\.pt is no text but binary") as error:
        opened(root)
    assert "\n" not in str(error.value)


def test_rows_as_text_are_said_and_a_table_alone_is_read_as_rows(folder):
    root = folder("a.txt", "b.txt", "c.json", "d.txt")
    assert any(note == "rows as text, as they are written: c.json" for note in opened(root).notes)
    for name in ("rows.csv", "rows.tsv", "rows.json", "rows.jsonl"):
        (root / name).write_text('{"text": "a"}\n{"text": "b"}\n')
        with pytest.raises(ConfigError, match=rf"{name} holds rows \(.*\), no text; rows are read with hf:"):
            opened(root / name)
    (root / "named.txt").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(ConfigError, match=r"named\.txt holds rows \(JSON lines\)"):
        opened(root / "named.txt")


def test_an_archive_is_read_as_a_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "wiki.zip", "w") as archive:
        for split in ("train", "valid", "test"):
            archive.writestr(f"wikitext/wiki.{split}.raw", f"{split} words\n" * 50)
        archive.writestr("__MACOSX/._junk", os.urandom(100))
    with tarfile.open(tmp_path / "wiki.tar.bz2", "w:bz2") as archive:
        for split in ("test", "train", "valid"):
            content = f"{split} words\n".encode() * 50
            entry = tarfile.TarInfo(f"wikitext/wiki.{split}.raw")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    for name in ("wiki.zip", "wiki.tar.bz2"):
        text = texts(opened(tmp_path / name))
        assert text == {split: f"{split} words\n".encode() * 50 for split in SPLITS}


def test_an_archive_of_many_files_is_shared_out_whole(tmp_path):
    want = {f"{i}.txt": f"file {i}\n".encode() * 50 for i in range(40)}
    with tarfile.open(tmp_path / "many.tar", "w") as archive:
        for name, content in want.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    where = files(opened(tmp_path / "many.tar"))
    assert sorted(os.path.basename(path) for split in where.values() for path in split) == sorted(want)
    assert len(where["valid"]) == 2


def test_a_converted_file_is_named(folder):
    root = folder("a.txt", "b.txt")
    (root / "c.txt").write_text("größer\n" * 100, encoding="utf-16")
    (root / "d.txt").write_text("mark\n" * 100, encoding="utf-8-sig")
    source = opened(root)
    assert any(note == "converted from UTF-16 to UTF-8: c.txt" for note in source.notes)
    assert any(note == "a byte-order mark is left out of the text of d.txt" for note in source.notes)
    text = b"".join(texts(source).values()).decode()
    assert text.count("größer\n") == 100
    assert "\ufeff" not in text


def test_links_are_followed_once(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "other").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "root" / f"{name}.txt").write_text(f"{name}\n" * 90)
    (tmp_path / "other" / "d.txt").write_text("d\n" * 90)
    root = tmp_path / "root"
    (root / "linked").symlink_to(tmp_path / "other")
    (root / "again").symlink_to(tmp_path / "other")
    (root / "circle").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    (root / "0.txt").symlink_to(root / "b.txt")
    source = opened(root)
    text = b"".join(texts(source).values()).decode()
    assert {name: text.count(name) for name in "abcd"} == dict.fromkeys("abcd", 90)
    assert any(note == "read once, though named twice by links: 0.txt, circle/, linked/, up/" for note in source.notes)


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"gone\.txt is not readable: No such file"):
        opened(tmp_path)
    (tmp_path / "gone.txt").unlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe is neither a file nor a folder"):
        opened(tmp_path)
    (tmp_path / "pipe").unlink()
    (tmp_path / "closed").mkdir()
    inside = type(tmp_path).iterdir

    def refuse(self):
        if self.name == "closed":
            raise PermissionError(13, "Permission denied", str(self))
        return inside(self)

    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    with pytest.raises(ConfigError, match="closed cannot be entered: Permission denied"):
        opened(tmp_path)


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


def test_names_need_not_be_utf8(tmp_path):
    for i, name in enumerate([b"\xff\xfe.txt", "ü.txt".encode(), b"a\nb.txt", b"c.txt"]):
        (tmp_path / "p").mkdir(exist_ok=True)
        Path(os.fsdecode(os.fsencode(tmp_path / "p") + b"/" + name)).write_text(f"text {i}\n" * 300)
    found = prepare(DataConfig(source=str(tmp_path / "p"), cache=str(tmp_path / "cache")))
    assert sum(split.bytes for split in found.splits.values()) == 4 * 300 * 7
