"""A finished run, small and quickly trained, that the commands look at."""

from __future__ import annotations

import pytest

from transformer_vq.cli import run

TINY = (
    "train.steps=4 train.seq_len=32 train.batch_size=2 train.warmup=1 eval.every=2 checkpoint.every=2 model.layers=2 "
    "model.width=16 model.key_dim=8 model.value_dim=8 model.window=8 model.block_len=8 model.quantizer.codes=8"
)


@pytest.fixture(scope="session")
def settings(tmp_path_factory) -> list[str]:
    """Overrides of lm/tiny: a small model and a small text."""
    folder = tmp_path_factory.mktemp("console")
    (folder / "text.txt").write_text("".join(f"line {i} of some text, {i * i % 7}\n" for i in range(600)))
    return [*TINY.split(), f"data.source={folder / 'text.txt'}", f"data.cache={folder / 'cache'}"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, settings) -> str:
    """A finished run."""
    folder = str(tmp_path_factory.mktemp("runs") / "run")
    assert run(["train", "lm/tiny", *settings, f"run_dir={folder}", "--quiet"]) == 0
    return folder


@pytest.fixture(scope="session")
def trained_bpe(tmp_path_factory, settings) -> str:
    """A finished run whose tokenizer reads text, not bytes."""
    folder = str(tmp_path_factory.mktemp("runs") / "bpe")
    assert run(["train", "lm/tiny", *settings, "data.tokenizer=bpe:300", f"run_dir={folder}", "--quiet"]) == 0
    return folder


@pytest.fixture(autouse=True)
def others_encodings_are_not_ours(monkeypatch):
    """`scripts/test` asks for encoding warnings; in processes of their own they are of other packages too."""
    monkeypatch.delenv("PYTHONWARNDEFAULTENCODING", raising=False)
