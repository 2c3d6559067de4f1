"""Tokens that another program made: read as they are, refused where the vocabulary lacks them, never given bytes."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from tiny_run import tiny_run
from tokenizers import Tokenizer as Library
from typer.testing import CliRunner

from transformer_vq.cli import app
from transformer_vq.config import ConfigError, DataConfig
from transformer_vq.data import load_tokenizer, prepare
from transformer_vq.data.tokenizers import ByteTokenizer
from transformer_vq.training import load_run, run


def folder(tmp_path, train, valid=None, dtype="<u2", **others):
    root = tmp_path / "tokens"
    root.mkdir()
    parts = {"train": train, "val": valid, **others}
    for name, ids in parts.items():
        if ids is not None:
            np.asarray(ids, dtype).tofile(root / f"{name}.bin")
    (root / "meta.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")  # harmful to whoever unpickles it
    return root


def config(tmp_path, root, tokenizer, **more):
    return DataConfig(source=str(root), cache=str(tmp_path / "cache"), tokenizer=tokenizer, **more)


def test_ids_are_read_and_nothing_is_said_per_byte(tmp_path):
    train, valid = np.arange(1000) % 700, np.arange(60)
    corpus = prepare(config(tmp_path, folder(tmp_path, train, valid), "tokens:700"))
    splits = corpus.splits
    assert splits["train"].tokens.tolist() == train[:950].tolist()  # test is carved off the end of train
    assert splits["test"].tokens.tolist() == train[950:].tolist()
    assert splits["valid"].tokens.tolist() == valid.tolist()
    assert all(file.bytes is None and file.words == 0 for file in splits.values())
    assert splits["train"].head(10).bytes is None
    with pytest.raises(ValueError, match="without their text"):
        splits["train"].covered(0, 5)
    assert any("test carved off the end of train" in note for note in corpus.notes)
    assert any("meta.pkl" in note for note in corpus.notes) and "unknown bytes" in corpus.describe()


def test_with_a_byte_level_tokenizer_the_bytes_are_those_spelled_and_documents_end_at_its_end(tmp_path):
    library = Library.from_str(ByteTokenizer().to_json())
    library.add_special_tokens(["<|endoftext|>"])
    library.save(str(tmp_path / "t.json"))
    ids = [*b"first one", 256, *b"second", 256, *b"third, which goes on"]
    root = folder(tmp_path, ids * 4, ids, test=ids)
    corpus = prepare(config(tmp_path, root, str(tmp_path / "t.json")))
    valid = corpus.splits["valid"]
    assert valid.tokens.tolist() == ids and valid.documents.tolist() == [0, 10, 17]
    assert valid.bytes == len(ids) - 2 and valid.head(11).bytes == 10
    assert [len(corpus.splits[name].documents) for name in ("train", "test")] == [9, 3]


def test_documents_end_with_an_id_where_it_is_named(tmp_path):
    ids = [5, 6, 0, 7, 0, 8]
    corpus = prepare(config(tmp_path, folder(tmp_path, ids * 9, ids), "tokens:9", document_separator="0"))
    assert corpus.splits["valid"].documents.tolist() == [0, 3, 5]


@pytest.mark.parametrize(
    ("tokenizer", "says"),
    [
        ("bytes", r"data.tokenizer = bytes: .* holds tokens"),
        ("bpe:300", r"data.tokenizer = bpe:300: .* holds tokens"),
        ("tokens:50", r"train.bin has id 50 as token 50 \(counted from 0\)"),
        ("tokens:", r"written tokens:SIZE"),
        ("tokens:0", r"written tokens:SIZE"),
        ("bytes+0", None),
    ],
)
def test_tokenizers_that_do_not_fit(tmp_path, tokenizer, says):
    root = folder(tmp_path, np.arange(200), np.arange(60))
    if says is None:
        assert prepare(config(tmp_path, root, tokenizer)).splits["valid"].bytes == 60
        return
    with pytest.raises(ConfigError, match=says) as error:
        prepare(config(tmp_path, root, tokenizer))
    assert "\n" not in str(error.value)
    assert not [path for path in (tmp_path / "cache").glob("*") if path.is_dir()]


def test_a_wrong_id_in_a_carved_split_is_named_by_its_place_in_the_file(tmp_path):
    train = np.zeros(1000)
    train[987] = 9
    with pytest.raises(ConfigError, match=r"train\.bin has id 9 as token 987"):
        prepare(config(tmp_path, folder(tmp_path, train, np.zeros(9)), "tokens:9"))


def test_half_a_token_is_refused_and_a_header_is_left_out(tmp_path):
    root = folder(tmp_path, np.arange(200), np.arange(60))
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 60
    (root / "val.bin").write_bytes(header.tobytes() + np.arange(60, dtype="<u2").tobytes())
    assert prepare(config(tmp_path, root, "tokens:200")).splits["valid"].tokens.tolist() == list(range(60))
    (root / "val.bin").write_bytes(b"abc")
    with pytest.raises(ConfigError, match=r"val\.bin has 3 bytes, which are no whole uint16 tokens"):
        prepare(config(tmp_path, root, "tokens:200"))


def test_large_vocabularies_have_four_bytes_an_id_and_limits_count_bytes_of_the_file(tmp_path):
    root = folder(tmp_path, np.arange(70_000, 70_400), np.arange(60), dtype="<u4")
    corpus = prepare(config(tmp_path, root, "tokens:100000", max_bytes=400, max_eval_bytes=40))
    assert [len(file) for file in corpus.splits.values()] == [100, 10, 10]
    assert corpus.splits["train"].tokens[0] == 70_000


def test_text_is_no_ids(tmp_path):
    (tmp_path / "text.txt").write_text("1 2 3 4 5\n" * 100)
    with pytest.raises(ConfigError, match="holds text"):
        prepare(config(tmp_path, tmp_path / "text.txt", "tokens:9"))


def test_a_run_on_ids_trains_by_bits_per_token_and_stands_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("transformer_vq.evaluation.plots.write_plots", lambda folder: [])
    root = folder(tmp_path, np.arange(3000) % 11, np.arange(300) % 11)
    settings = tiny_run(
        tmp_path, data__source=str(root), data__tokenizer="tokens:11", data__document_separator=None, train__steps=4
    )
    summary = run(settings, quiet=True)
    assert summary["test"]["bits_per_token"] == pytest.approx(summary["test"]["loss"] / math.log(2))
    assert "bits_per_byte" not in summary["test"] and "bytes" not in summary["test"]
    for path in root.iterdir():
        path.unlink()
    loaded = load_run(settings.run_dir)
    assert loaded.tokenizer.name == "tokens:11" and loaded.model.config.vocab_size == 11
    assert load_tokenizer(settings.run_dir).encode("3 10 0") == [3, 10, 0]
    arguments = ["generate", settings.run_dir, "--prompt", "1 2 3", "--tokens", "5", "--json"]
    (text,) = json.loads(CliRunner().invoke(app, arguments).stdout)["texts"]
    assert len(text["tokens"]) == 5 and text["text"].split() == [str(i) for i in text["tokens"]]
    refused = CliRunner().invoke(app, [*arguments[:3], "some text", *arguments[4:]])
    assert isinstance(refused.exception, ConfigError) or refused.exit_code == 2


def test_documents_are_whole_over_the_borders_of_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("transformer_vq.data.token_files.CHUNK", 7)
    ids = np.random.default_rng(0).integers(0, 5, 500)
    file = prepare(config(tmp_path, folder(tmp_path, ids, ids, test=ids), "tokens:5", document_separator="0")).splits[
        "train"
    ]
    edges = [*file.documents.tolist(), len(file)]
    assert all(0 not in ids[a : b - 1] for a, b in pairwise(edges)) and (ids[np.array(edges[1:-1]) - 1] == 0).all()
