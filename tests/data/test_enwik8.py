"""enwik8 from an archive, and what is said when it cannot be had."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest

from transformer_vq.config import ConfigError, DataConfig
from transformer_vq.data import enwik8, prepare


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """An address that holds an archive of 2,000 bytes."""
    text = np.random.default_rng(0).integers(32, 127, 2000, dtype=np.uint8).tobytes()
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "w") as file:
        file.writestr("enwik8", text)
    monkeypatch.setattr(enwik8, "ADDRESS", (tmp_path / "enwik8.zip").as_uri())
    monkeypatch.setattr(enwik8, "SIZE", 2000)
    monkeypatch.chdir(tmp_path)
    return text


def corpus(tmp_path):
    return prepare(DataConfig(source="enwik8", cache=str(tmp_path / "cache")))


def test_it_is_fetched_once_and_split_as_usual(tmp_path, archive):
    splits = corpus(tmp_path).splits
    assert {name: len(split) for name, split in splits.items()} == {"train": 1800, "valid": 100, "test": 100}
    assert b"".join(split.tokens.tobytes() for split in splits.values()) == archive
    (tmp_path / "enwik8.zip").unlink()
    assert corpus(tmp_path).splits["test"].tokens.tobytes() == archive[1900:]


def test_what_cannot_be_had_leaves_nothing_and_says_what_to_do(tmp_path, archive, monkeypatch):
    monkeypatch.setattr(enwik8, "SIZE", 3000)
    with pytest.raises(
        ConfigError, match=r"holds 2,000 bytes; with the official file of 3,000 bytes at hand: data\.source"
    ):
        corpus(tmp_path)
    monkeypatch.setattr(enwik8, "ADDRESS", (tmp_path / "gone.zip").as_uri())
    with pytest.raises(
        ConfigError, match=r"gone\.zip could not be read: .*data\.source=FILE.*hub: data\.source=hf:LTCB"
    ) as error:
        corpus(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "broken.zip").write_bytes(b"no archive")
    monkeypatch.setattr(enwik8, "ADDRESS", (tmp_path / "broken.zip").as_uri())
    with pytest.raises(ConfigError, match="File is not a zip file"):
        corpus(tmp_path)
    assert list((tmp_path / "cache" / "enwik8").iterdir()) == []
