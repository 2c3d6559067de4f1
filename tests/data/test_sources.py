from pathlib import Path

import pytest

from transformer_vq.data.sources import split_name


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.txt", "train"),
        ("TRAIN.TXT", "train"),
        ("myTrainSet.txt", "train"),
        ("corpus_training-00001-of-00010.txt", "train"),
        ("Train/a.txt", "train"),
        ("a/b/Test/c.txt", "test"),
        ("wiki.valid.tokens", "valid"),
        ("val1.txt", "valid"),
        ("dev.txt", "valid"),
        ("validation/test.txt", "valid"),
        ("testing.txt", "test"),
        ("HTTPTest.txt", "test"),
        ("constraint.txt", None),
        ("latest.txt", None),
        ("device.txt", None),
        ("interval.txt", None),
        ("contest/restrain.txt", None),
        ("trainer.py", None),
        ("train_test.txt", None),
        ("train_test/valid.txt", "valid"),
    ],
)
def test_a_split_is_named_by_a_whole_word(path, split):
    assert split_name(Path(path)) == split
