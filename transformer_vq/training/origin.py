"""Checkpoints by name, `RUN[@best|@last|@STEP]`, and runs that start from the weights of another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from transformer_vq.config import ConfigError
from transformer_vq.data import load_tokenizer
from transformer_vq.data.tokenizers import FILE, Tokenizer
from transformer_vq.training.checkpoints import load_tensors, verify
from transformer_vq.training.distributed import on_main
from transformer_vq.training.run_folder import RunFolder
from transformer_vq.training.task import Task

BY_TOKEN = ("embedding.weight", "head.weight", "head.bias", "head_bias")  # tensors with a row for each token


def find_checkpoint(origin: str) -> Path:
    """The folder of `RUN[@best|@last|@STEP]`; a RUN alone means its last.  Raises ConfigError naming what there is."""
    run, _, which = (origin, "", "last") if Path(origin).is_dir() or "@" not in origin else origin.rpartition("@")
    if not Path(run).is_dir():
        raise ConfigError(f"{origin}: there is no run folder {run}")
    return RunFolder(run).checkpoints.resolve(which)


def warm_start(task: Task, origin: str, accelerator: Accelerator) -> dict[str, str]:
    """Weights of another run for the first player; a line for the first screen."""
    try:
        checkpoint = find_checkpoint(origin)
    except ConfigError as error:
        raise ConfigError(f"train.init_from = {error}") from None
    on_main(accelerator, lambda: verify(checkpoint))
    first = next(iter(task.players))
    notes = task.warm_start(load_tensors(checkpoint / f"{first}.safetensors"), checkpoint.parents[1])
    return {"starts from": f"{checkpoint}; {'; '.join(notes)}"}


def take_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    ours: Sequence[Any],
    theirs: Sequence[Any],
    run: Path,
    fresh: bool,
    tokenizer: Tokenizer | None,
) -> list[str]:
    """Take every tensor whose name and shape are `model`'s; a quantizer is taken whole, from one of its kind, or not.

    ours, theirs: the quantizers' settings by layer. One with a `start_step` is not taken: it begins unquantized, and
    with a codebook from the keys of its start. fresh: none is taken. Embedding and head are taken where the tokenizers
    are the same by content: else a row means another token; None: there is none. Returns what was taken and what not.
    Raises ConfigError when nothing fits.
    """
    state = model.state_dict()
    fits = {name for name, tensor in weights.items() if name in state and state[name].shape == tensor.shape}
    for i, (a, b) in enumerate(zip(theirs, ours, strict=False)):
        mine = {name for name in (*state, *weights) if name.startswith(f"layers.{i}.quantizer.")}
        needed = {name for name in mine if not name.endswith(".age")}  # which is there with dead_code_threshold alone
        if fresh or a.kind != b.kind or not needed <= fits or getattr(b, "start_step", 0):
            fits -= mine
    same_tokens = tokenizer is None or tokenizer_hash(run) == tokenizer.sha256
    if not same_tokens:
        fits -= set(BY_TOKEN)
    taken = {name: tensor for name, tensor in weights.items() if name in fits}
    if not taken:
        raise ConfigError(f"train.init_from = {run}: no tensor there has the name and shape of one of this model's")
    model.load_state_dict(taken, strict=False)
    skipped = [name for name in weights if name not in taken]
    new = [name for name in state if name not in taken]
    notes = [] if same_tokens else ["its tokenizer is another: embedding and head start fresh"]
    notes += [f"{len(taken)} tensors are taken"]
    notes += [f"{len(new)} start fresh ({_some(new)})"] if new else []
    return [*notes, f"{len(skipped)} of that run are not used ({_some(skipped)})"] if skipped else notes


def tokenizer_hash(run: Path) -> str | None:
    """Identity of a run's tokenizer; None where it kept none."""
    return load_tokenizer(run).sha256 if (run / FILE).is_file() else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
