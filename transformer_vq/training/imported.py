"""A run folder around a model that was trained elsewhere: one checkpoint, and what its users need."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from transformer_vq.config import RunConfig, save_config
from transformer_vq.data.tokenizers import Tokenizer, make_tokenizer
from transformer_vq.models import TransformerVQ
from transformer_vq.training.checkpoints import Checkpoints, save_tensors
from transformer_vq.training.language import with_vocabulary


def write_run(
    model: TransformerVQ,
    config: RunConfig,
    target: Path,
    add: Callable[[Path], None] = lambda _: None,
    tokenizer: Tokenizer | None = None,
    step: int = 0,
) -> Path:
    """Write `target`, which `eval`, `generate`, `doctor` and `train.init_from` take; whole or not at all.

    add: writes into the folder what else belongs there, before it gets its name.  tokenizer: None: the one that
    `data.tokenizer` names.  step: how many optimizer steps lie behind the model.
    Returns the folder.  Raises ConfigError when `data.tokenizer` is no tokenizer or has more tokens than the model.
    """
    tokenizer = tokenizer or make_tokenizer(config.data.tokenizer, [])
    with_vocabulary(config.model, tokenizer)
    target.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=target.parent, prefix=".writing-"))
    try:
        run = place / target.name
        run.mkdir()
        save_config(config.written(), run / "config.yaml")
        tokenizer.save(run)
        checkpoints = Checkpoints(run / "checkpoints")
        save_tensors(model.state_dict(), checkpoints.begin(step) / "model.safetensors")
        checkpoints.commit(step)
        add(run)
        os.replace(run, target)
    finally:
        shutil.rmtree(place)
    return target
