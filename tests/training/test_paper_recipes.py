"""The `-tiny` recipes on local data of the shape that the full ones read: a few steps, and what they report."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from transformer_vq.config import RunConfig, load_config
from transformer_vq.data import prepare
from transformer_vq.evaluation import evaluate
from transformer_vq.training import LanguageTask, load_run, run

WORDS = ["time", "whale", "sea", "ship", "captain", "of", "the", "and", "a", "white"]


def books(folder):
    """Parquet as the hub holds PG-19."""
    random = np.random.default_rng(0)
    for split, count in {"train": 12, "validation": 2, "test": 2}.items():
        texts = ["\n".join(" ".join(random.choice(WORDS, 9)) for _ in range(60)) for _ in range(count)]
        rows = {"short_book_title": [str(i) for i in range(count)], "publication_date": [1850] * count, "text": texts}
        pq.write_table(pa.table(rows), folder / f"{split}-00000-of-00001.parquet")
    return texts


def recipe(tmp_path, name, *overrides):
    """A recipe that writes below tmp_path, with a model of two thin layers."""
    thin = ["model.layers=2", "model.width=32", "model.key_dim=16", "model.value_dim=32", "model.window=16"]
    fast = ["train.log_every=1", "eval.every=null", "checkpoint.every=null", "train.warmup=2", "model.block_len=16"]
    places = [f"run_dir={tmp_path / name}", f"data.cache={tmp_path / 'cache'}"]
    return load_config(f"lm/{name}", [*thin, *fast, *places, *overrides], RunConfig)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("transformer_vq.evaluation.plots.write_plots", lambda folder: [])


@pytest.mark.parametrize("kind", ["", "-full"])
def test_enwik8_from_a_folder(tmp_path, kind):
    (tmp_path / "data").mkdir()
    text = np.random.default_rng(0).integers(97, 105, 40_000, dtype=np.uint8)
    (tmp_path / "data" / "enwik8").write_bytes(text.tobytes())
    config = recipe(tmp_path, f"enwik8-tiny{kind}", f"data.source={tmp_path / 'data'}", "train.steps=6")
    summary = run(config, quiet=True)
    assert {name: len(file) for name, file in prepare(config.data).splits.items()} == {
        "train": 36_000,
        "valid": 2_000,
        "test": 2_000,
    }
    assert 0 < summary["test"]["bits_per_byte"] < 9 and summary["test"]["context"] == 1024


@pytest.mark.parametrize("kind", ["", "-full"])
def test_pg19_from_parquet_counts_words(tmp_path, kind):
    (tmp_path / "data").mkdir()
    texts = books(tmp_path / "data")
    source = [f"data.source=hf:{tmp_path / 'data'}", "data.tokenizer=bpe:300", "train.seq_len=64", "train.steps=6"]
    config = recipe(tmp_path, f"pg19-tiny{kind}", *source)
    test = run(config, quiet=True)["test"]
    words = sum(len(text.split()) for text in texts)
    assert test["word_perplexity"] == pytest.approx(math.exp(test["loss"] * test["tokens"] / words))
    loaded = load_run(str(config.run_dir))
    split = prepare(config.data).splits["test"]
    assert len(split.documents) == 2 and split.words == words
    apart = evaluate(loaded.model, split, context=1024, batch_size=16, reset_documents=True)
    assert apart["loss"] == pytest.approx(test["loss"], rel=1e-6)


@pytest.mark.parametrize("kind", ["", "-full"])
def test_imagenet64_from_arrays_reads_a_picture_a_sequence(tmp_path, kind):
    random = np.random.default_rng(0)
    pictures = {
        split: random.integers(256, size=(n, 16, 16, 3), dtype=np.uint8) for split, n in (("train", 40), ("test", 3))
    }
    np.savez(tmp_path / "p.npz", **pictures)
    config = recipe(tmp_path, f"imagenet64-tiny{kind}", f"data.source={tmp_path / 'p.npz'}", "train.steps=5")
    task = LanguageTask(config, torch.device("cpu"))
    assert task.whole
    for step in range(5):
        rows = task._read(step, range(8))
        assert rows.fresh.all() == (step % 4 == 0) and (rows.segments == rows.segments[:, :1]).all()
    summary = run(config, quiet=True)
    assert 0 < summary["test"]["bits_per_byte"] < 12
    with open(f"{config.run_dir}/metrics.jsonl") as file:
        assert sum(json.loads(line)["split"] == "train" for line in file) == 5
