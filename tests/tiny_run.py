"""A language-model run of a second: its text and its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformer_vq.config import RunConfig, validate
from transformer_vq.config.load import set_key


def write_text(folder: Path, lines: int = 300) -> Path:
    """Some text with structure, in documents that a zero byte ends; about 13 kB."""
    path = folder / "text.txt"
    if not path.exists():
        path.write_text("".join(f"{i} green bottles, {i * i % 97} left\n" + "\0" * (i % 7 == 0) for i in range(lines)))
    return path


def tiny_run(folder: Path, name: str = "run", **overrides: Any) -> RunConfig:
    """Two layers, 20 steps of 4 rows. Overrides have dotted keys, with `__` for the dot."""
    tree: dict[str, Any] = {
        "run_dir": str(folder / name),
        "data": {"source": str(write_text(folder)), "cache": str(folder / "cache"), "document_separator": "\0"},
        "model": {
            "layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "key_dim": 8, "value_dim": 8, "window": 8,
            "block_len": 8, "quantizer": {"codes": 8},
        },
        "train": {"steps": 20, "batch_size": 4, "seq_len": 24, "warmup": 4, "log_every": 1, "lr": 0.01},
        "eval": {"every": None, "batch_size": 2},
    }  # fmt: skip
    for key, value in overrides.items():
        set_key(tree, key.replace("__", "."), value)
    return validate(tree, RunConfig)
