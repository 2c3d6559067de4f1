import json
import re
from itertools import pairwise

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from transformer_vq.config import ConfigError, DataConfig
from transformer_vq.data import prepare
from transformer_vq.data.huggingface import which_splits

ROWS = [f"Row {i}: größer und weiter.\n" * (i % 5) for i in range(2000)]
TEXT = "".join(ROWS).encode()


def write_parquet(path, rows, **columns):
    pq.write_table(pa.table({"text": rows, "id": list(range(len(rows))), **columns}), path)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps({"text": row, "tags": [1]}) + "\n" for row in rows))


def prepared(source, tmp_path, **more):
    return prepare(DataConfig(source=f"hf:{source}", cache=str(tmp_path / "cache"), **more))


def decoded(corpus):
    return {name: corpus.tokenizer.decode_bytes(file.tokens.tolist()) for name, file in corpus.splits.items()}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_folder_of_splits(tmp_path, kind, streaming):
    folder = tmp_path / "rows"
    folder.mkdir()
    write = write_parquet if kind == "parquet" else write_jsonl
    write(folder / f"train-00000.{kind}", ROWS[:1000])
    write(folder / f"train-00001.{kind}", ROWS[1000:1800])
    write(folder / f"validation-00000.{kind}", ROWS[1800:1900])
    write(folder / f"test-00000.{kind}", ROWS[1900:])
    corpus = prepared(folder, tmp_path, streaming=streaming)
    want = {"train": ROWS[:1800], "valid": ROWS[1800:1900], "test": ROWS[1900:]}
    assert decoded(corpus) == {name: "".join(rows).encode() for name, rows in want.items()}
    train = corpus.splits["train"]
    edges = [*train.documents.tolist(), len(train)]
    documents = [train.tokenizer.decode(train.tokens[a:b]) for a, b in pairwise(edges)]
    assert documents == [row for row in ROWS[:1800] if row]
    assert corpus.notes == ()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["all.parquet", "all.jsonl"])
def test_one_file_is_carved_by_position_and_says_so(tmp_path, name, streaming):
    (write_parquet if name.endswith("parquet") else write_jsonl)(tmp_path / name, ROWS)
    corpus = prepared(tmp_path / name, tmp_path, streaming=streaming)
    text = decoded(corpus)
    assert text["train"] + text["valid"] + text["test"] == TEXT
    assert len(text["train"]) == len(TEXT) * 90 // 100
    assert len(text["valid"]) == len(TEXT) * 95 // 100 - len(TEXT) * 90 // 100
    assert "Valid and test carved off the end of train" in corpus.describe()


def test_one_row_is_carved_too(tmp_path):
    """A dataset that holds enwik8 in a single row has the same three parts as the file."""
    write_parquet(tmp_path / "one.parquet", [TEXT.decode()])
    text = decoded(prepared(tmp_path / "one.parquet", tmp_path))
    assert text["train"] == TEXT[: len(TEXT) * 90 // 100]
    assert text["train"] + text["valid"] + text["test"] == TEXT


@pytest.mark.parametrize(
    ("source", "name", "asked"),
    [
        ("LTCB/enwik8/enwik8-raw@refs/convert/parquet", "LTCB/enwik8", {"data_dir": "enwik8-raw"}),
        ("a/b/part@v1", "a/b", {"name": "part"}),
        ("a/b@v1", "a/b", {"name": None}),
        ("a/b", "a/b", {"name": None}),
    ],
)
def test_a_revision_of_the_hub(tmp_path, monkeypatch, source, name, asked):
    """The branch that the hub converts: a folder a configuration, a folder a split in it."""
    folder = tmp_path / "branch" / "enwik8-raw" / "train"
    folder.mkdir(parents=True)
    write_parquet(folder / "0000.parquet", [TEXT.decode()])
    (tmp_path / "branch" / "enwik8" / "train").mkdir(parents=True)
    write_parquet(tmp_path / "branch" / "enwik8" / "train" / "0000.parquet", ROWS)
    load, calls = datasets.load_dataset_builder, []

    def builder(path, revision, **more):
        calls.append((path, {"revision": revision, **more}))
        return load(str(tmp_path / "branch"), data_dir="enwik8-raw")

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    text = decoded(prepared(source, tmp_path))
    assert calls == [(name, {"revision": source.partition("@")[2] or None, **asked})]
    assert text["train"] == TEXT[: len(TEXT) * 90 // 100]
    assert text["train"] + text["valid"] + text["test"] == TEXT


def test_streaming_stops_at_max_bytes(tmp_path):
    write_jsonl(tmp_path / "all.jsonl", ROWS)
    with (tmp_path / "all.jsonl").open("a") as file:
        file.write("".join(json.dumps({"text": "more " * 1000, "tags": [1]}) + "\n" for _ in range(20_000)))
        file.write("this is not JSON and is never reached\n")
    corpus = prepared(tmp_path / "all.jsonl", tmp_path, streaming=True, max_bytes=1000)
    text = decoded(corpus)
    assert text["train"] + text["valid"] + text["test"] == TEXT[:1000]
    assert "of its first 1,000 bytes" in corpus.describe()


def test_a_bpe_is_trained_on_the_train_rows_only(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ["abab"] * 100)
    write_jsonl(folder / "validation.jsonl", ["qqqq"] * 100)
    write_jsonl(folder / "test.jsonl", ["zzzz"] * 100)
    corpus = prepared(folder, tmp_path, tokenizer="bpe:300")
    assert len(corpus.splits["train"]) < 400
    assert len(corpus.splits["valid"]) == len(corpus.splits["test"]) == 400


def test_plain_and_streaming_share_the_tokens(tmp_path):
    write_parquet(tmp_path / "all.parquet", ROWS)
    folders = {prepared(tmp_path / "all.parquet", tmp_path, streaming=s).folder for s in (False, True)}
    assert len(folders) == 1


def test_another_column(tmp_path):
    write_parquet(tmp_path / "all.parquet", ROWS, body=["body"] * len(ROWS))
    corpus = prepared(tmp_path / "all.parquet", tmp_path, field="body")
    assert decoded(corpus)["train"] == b"body" * (len(ROWS) * 90 // 100)
    assert corpus.folder != prepared(tmp_path / "all.parquet", tmp_path).folder


def test_binary_columns_and_rows_without_text(tmp_path):
    pq.write_table(pa.table({"text": [b"\xff\x00", None, b"", b"ab"] * 50}), tmp_path / "all.parquet")
    corpus = prepared(tmp_path / "all.parquet", tmp_path)
    assert decoded(corpus)["train"] == (b"\xff\x00ab" * 50)[:180]
    assert corpus.splits["train"].documents.tolist() == list(range(0, 180, 2))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("txt", "data.field = txt: no such column; train has text, tags"),
        ("tags", "data.field = tags: row 0 of train holds list, not text"),
    ],
)
def test_a_column_without_text_is_one_line(tmp_path, field, message, streaming):
    write_jsonl(tmp_path / "all.jsonl", ROWS)
    with pytest.raises(ConfigError, match=message) as error:
        prepared(tmp_path / "all.jsonl", tmp_path, field=field, streaming=streaming)
    assert "\n" not in str(error.value)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_rows_are_one_line(tmp_path, streaming):
    (tmp_path / "all.jsonl").write_text('{"text": "fine"}\n{"text": oops}\n')
    with pytest.raises(ConfigError, match=r"is not readable: .*JSON") as error:
        prepared(tmp_path / "all.jsonl", tmp_path, streaming=streaming)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/where.parquet/x/y", "Couldn't|no such dataset"),
        ("someone/corpus", r"tried https://huggingface.co/datasets/someone/corpus: Couldn't reach .*=hf:FOLDER"),
        ("a/b/c@refs/convert/parquet", r"tried https://huggingface.co/datasets/a/b/c: Couldn't reach .*=hf:FOLDER"),
        ("/none/rows.parquet", "no such file or folder"),
        ("{tmp}/notes.txt", "a text file needs no hf:"),
        ("{tmp}/texts", "parquet.* but text; a folder of text files needs no hf:"),
        ("{tmp}/more", "files of more than one kind: json: a.jsonl; text: b.txt"),
        ("{tmp}/empty", "no dataset there"),
        ("{tmp}/onlytest", "no split train; the dataset has test"),
    ],
)
def test_what_is_not_there_says_what_to_do(tmp_path, source, message):
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "onlytest").mkdir()
    for name in ("texts/a.txt", "texts/sub/b.text", "more/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one\ntwo\n")
    write_jsonl(tmp_path / "more" / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "onlytest" / "test.jsonl", ROWS)
    source = source.format(tmp=tmp_path)
    with pytest.raises(ConfigError, match=message) as error:
        prepared(source, tmp_path)
    assert str(error.value).startswith(f"data.source = hf:{source}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "names",
    [
        ("Train.jsonl", "Dev.jsonl", "Test.jsonl"),
        ("Train/a.jsonl", "Validation/a.jsonl", "Testing/a.jsonl"),
        ("corpus-training.jsonl", "corpus-dev.jsonl", "corpus-testing.jsonl"),
    ],
)
def test_files_of_rows_are_sorted_as_files_of_text(tmp_path, names):
    folder = tmp_path / "rows"
    for name, rows in zip(names, (ROWS[:1800], ROWS[1800:1900], ROWS[1900:]), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / name, rows)
    (folder / "README.md").write_text("about it")
    text = decoded(prepared(folder, tmp_path))
    assert text["train"] == "".join(ROWS[:1800]).encode()
    assert text["test"] == "".join(ROWS[1900:]).encode()
    write_jsonl(folder / "chapter.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"1 of \d files name no split, where others .*: chapter\.jsonl"):
        prepared(folder, tmp_path)


@pytest.mark.parametrize(
    ("found", "named", "note"),
    [
        (["training", "dev", "testing"], {"train": ["training"], "valid": ["dev"], "test": ["testing"]}, None),
        (["train", "test", "unsupervised"], {"train": ["train"], "test": ["test"]}, "left out: unsupervised"),
        (["train", "test", "test_hard"], {"train": ["train"], "test": ["test"]}, "left out: test_hard"),
        (
            ["train.clean.100", "train.clean.360", "test.clean"],
            {"train": ["train.clean.100", "train.clean.360"], "test": ["test.clean"]},
            r"train is train\.clean\.100 and train\.clean\.360",
        ),
    ],
)
def test_a_datasets_own_splits(found, named, note):
    got, notes = which_splits(found)
    assert got == named
    assert re.search(note, " ".join(notes)) if note else notes == ()
