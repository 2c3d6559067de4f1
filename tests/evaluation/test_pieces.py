"""What a run keeps of each document, window or example adds up to what its summary says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tiny_run import tiny_run

from transformer_vq.config import validate
from transformer_vq.config.recall import RecallRunConfig
from transformer_vq.data import prepare
from transformer_vq.evaluation.pieces import Piecewise, pieces_of_rows, pieces_of_text, read_pieces, write_pieces
from transformer_vq.training import recall, run


def mean(piecewise):
    return piecewise.total.sum() / piecewise.weight.sum()


@pytest.fixture
def split(tmp_path):
    return prepare(tiny_run(tmp_path).data).splits["train"]


def test_a_document_is_a_piece_where_there_are_enough(split):
    assert len(split.documents) >= 20
    nats = np.random.default_rng(0).exponential(size=len(split) - 1)
    found = pieces_of_text(nats, split, 7)
    ends = np.append(split.documents[1:], len(split))
    want = [nats[max(a - 1, 0) : b - 1].sum() for a, b in zip(split.documents, ends, strict=True)]
    np.testing.assert_allclose(found["loss"].total, want)
    assert found["loss"].weight.sum() == len(nats) and found["bits_per_byte"].weight.sum() == split.bytes - 1


def test_else_a_window_is(split):
    short = split.head(200)
    assert len(short.documents) < 20
    nats = np.arange(199.0)
    found = pieces_of_text(nats, short, 50)
    np.testing.assert_allclose(found["loss"].total, [nats[a : a + 50].sum() for a in (0, 50, 100, 150)])
    assert found["loss"].weight.tolist() == [50, 50, 50, 49]
    np.testing.assert_allclose(found["bits_per_token"].total, found["loss"].total / math.log(2))


def test_rows_count_what_counts():
    values, counts = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[True, False], [True, True]])
    found = pieces_of_rows({"bits": (values, counts)})["bits"]
    assert (found.total.tolist(), found.weight.tolist()) == ([1.0, 7.0], [1.0, 2.0])


def test_what_is_written_is_read(tmp_path):
    pieces = {"distance16/bits": Piecewise(np.array([1.0, 2.5]), np.array([3.0, 0.0]))}
    write_pieces(tmp_path, {"test": pieces})
    found = read_pieces(tmp_path, "test")
    assert found.keys() == pieces.keys() and read_pieces(tmp_path, "valid") == {}
    np.testing.assert_array_equal(found["distance16/bits"], pieces["distance16/bits"])


@pytest.mark.parametrize("context", ["full", 16])
def test_a_language_models_add_up_to_its_summary(tmp_path, context):
    config = tiny_run(tmp_path, train__steps=2, eval__context=context)
    summary = run(config, quiet=True)
    for name in ("test", "valid"):
        found = read_pieces(tmp_path / "run", name)
        assert found.keys() == {"loss", "bits_per_token", "bits_per_byte"}
        for metric, piecewise in found.items():
            assert mean(piecewise) == pytest.approx(summary[name][metric], rel=1e-9)
    run(tiny_run(tmp_path, train__steps=1, eval__context=context), overwrite=True, quiet=True)
    assert not np.array_equal(read_pieces(tmp_path / "run", "test")["loss"].total, found["loss"].total)


def test_recalls_add_up_by_distance_too(tmp_path):
    tree = {
        "run_dir": str(tmp_path / "run"),
        "recall": {"vocab": 16, "pairs": 2, "examples": 12, "eval_lengths": [16]},
        "model": {"layers": 1, "width": 16, "key_dim": 8, "value_dim": 8, "window": 4, "quantizer": {"codes": 8}},
        "train": {"steps": 2, "batch_size": 4, "seq_len": 12, "warmup": 1},
    }
    summary = recall.run(validate(tree, RecallRunConfig), quiet=True)["test"]
    found = read_pieces(tmp_path / "run", "test")
    assert {"loss", "bits", "accuracy"} < found.keys() and any(name.startswith("distance") for name in found)
    for metric, piecewise in found.items():
        assert len(piecewise.total) == 12 and mean(piecewise) == pytest.approx(summary[metric], rel=1e-9)
