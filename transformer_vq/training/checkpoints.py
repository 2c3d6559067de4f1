"""Checkpoints that survive a kill, a full disk and a flipped bit: safetensors, JSON, a manifest of hashes. No pickle.

    checkpoints/step-00000200/   model.safetensors, model-optimizer.safetensors, carried-0.safetensors, trainer.json,
                                 manifest.json: sha256 and size of each of them
                                 model/, model-optimizer/ in place of those files where parameters are cut over
                                 processes: each process's part in a file of its own
    checkpoints/best.json        which of them is the best so far, and its number

A checkpoint is written into a temporary folder, every file and then the folder flushed to disk, the manifest last;
then the folder is renamed, its parent flushed, and only then old ones are deleted. A folder without a manifest is no
checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from transformer_vq.config import ConfigError
from transformer_vq.files import flush, read_text, write_text, writing

MANIFEST = "manifest.json"
TRAINER = "trainer.json"  # where training stood; a checkpoint of an imported model has none
_STEP = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint is damaged."""


class Checkpoints:
    """The checkpoints of one run; `keep` latest ones stay, and the best."""

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder, self.keep = folder, keep

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order."""
        matches = (_STEP.fullmatch(manifest.parent.name) for manifest in self.folder.glob(f"step-*/{MANIFEST}"))
        return sorted(int(match[1]) for match in matches if match)

    def last(self) -> int | None:
        """The latest step that has a checkpoint."""
        return max(self.steps(), default=None)

    def last_whole(self) -> tuple[int, list[str]]:
        """The latest step whose checkpoint is undamaged, 0 without any; and a sentence about each later one.

        Those are set aside under another name, for whoever wants to look. Raises CheckpointError, and changes nothing,
        when there are checkpoints and none is whole.
        """
        complaints: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                verify(self.path(step))
            except CheckpointError as error:
                complaints[step] = str(error)
                continue
            return step, [self._set_aside(step, why) for step, why in complaints.items()]
        if complaints:
            why = next(iter(complaints.values()))
            raise CheckpointError(f"{why}; no earlier checkpoint is whole, --overwrite starts anew")
        return 0, []

    def _set_aside(self, step: int, why: str) -> str:
        target, number = self.folder / f"damaged-{step:08d}", 1
        while target.exists():
            target, number = self.folder / f"damaged-{step:08d}-{number}", number + 1
        self.path(step).rename(target)
        return f"{why}; set aside as {target.name}"

    def best(self) -> dict[str, Any] | None:
        """{"step": ..., metric: value} of the best checkpoint so far, while it is there."""
        path = self.folder / "best.json"
        if not path.is_file():
            return None
        best: dict[str, Any] = json.loads(read_text(path))
        return best if best["step"] in self.steps() else None

    def mark_best(self, step: int, metric: str, value: float) -> None:
        """Remember a step as the best so far; its checkpoint must be there."""
        write_text(self.folder / "best.json", json.dumps({"step": step, metric: value}))
        self.prune()

    def resolve(self, which: str) -> Path:
        """The folder of `best`, `last` or a step.  Raises ConfigError naming what there is."""
        steps, best = self.steps(), self.best()
        step = best["step"] if which == "best" and best else self.last() if which in ("best", "last") else None
        step = int(which) if which.isdecimal() else step
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise ConfigError(f"{self.folder.parent}@{which}: no such checkpoint; steps that have one: {there}")
        return self.path(step)

    # Writing: begin on one process, each adds its files, commit on one process.

    def begin(self, step: int) -> Path:
        """An empty temporary folder for a step; what an interrupted write left behind is removed."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        for rest in self.folder.glob(".*"):
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        temporary = self.temporary(step)
        with writing(temporary):
            temporary.mkdir()
        return temporary

    def temporary(self, step: int) -> Path:
        """Where the files of a step are written before it is committed."""
        return self.folder / f".writing-{step:08d}"

    def commit(self, step: int) -> Path:
        """Make the temporary folder a checkpoint, then delete the ones that need not be kept."""
        temporary, final = self.temporary(step), self.path(step)
        inside = sorted(temporary.rglob("*"))
        files = {
            path.relative_to(temporary).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
            for path in inside
            if path.is_file()
        }
        write_text(temporary / MANIFEST, json.dumps({"step": step, "files": files}, indent=1))
        for folder in (*filter(Path.is_dir, inside), temporary):
            flush(folder)
        if final.exists():  # the same step once more, after resuming from an earlier one
            final.rename(self.folder / f".deleted-{step:08d}")
        temporary.rename(final)
        flush(self.folder)
        self.prune()
        return final

    def prune(self) -> None:
        """Delete all but the latest `keep` and the best."""
        steps, best = self.steps(), self.best()
        kept = {*steps[-self.keep :], best["step"] if best else None}
        for step in steps:
            if step not in kept:  # renamed first: a kill must not leave half a checkpoint under its name
                self.path(step).rename(self.folder / f".deleted-{step:08d}")
        for rest in self.folder.glob(".deleted-*"):
            shutil.rmtree(rest)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to disk and wait until they are there; tensors that share memory are written twice.

    Raises WriteError.
    """
    with writing(path, sum(t.nbytes for t in tensors.values())):
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path)
        flush(path)


def save_json(values: Mapping[str, Any], path: Path) -> None:
    """Write values to disk and wait until they are there.  Raises WriteError."""
    write_text(path, json.dumps(values, indent=1))


def verify(checkpoint: Path) -> None:
    """Compare every file of a checkpoint with its manifest.  Raises CheckpointError naming the file that is damaged."""
    try:
        manifest = json.loads(read_text(checkpoint / MANIFEST))
        files = {name: (entry["sha256"], entry["bytes"]) for name, entry in manifest["files"].items()}
        step = int(manifest["step"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint / MANIFEST} is damaged: {error!r}") from None
    if checkpoint.name != f"step-{step:08d}":
        raise CheckpointError(f"{checkpoint / MANIFEST} is damaged: it names step {step}")
    for name, (digest, size) in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != size or sha256(path) != digest:
            raise CheckpointError(
                f"{path} is damaged: {path.stat().st_size} bytes (written: {size}), or another sha256 than written"
            )


def save_parts(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write this process's parts of tensors that are cut over processes into a file of its own in `folder`, and wait
    until they are on disk; of those that are whole everywhere one process writes each. All processes call it together.

    Raises WriteError, where a part does not fit, on every process.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
        except CheckpointException as failed:
            raise next((e for e, _ in failed.failures.values() if isinstance(e, OSError)), failed) from failed


def load_tensors(path: Path, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Tensors of NAME.safetensors, or of the parts in the folder NAME, whole, on the CPU.

    like: tensors that are cut over processes. Of a tensor in parts that has the name and shape of one of these, or
    NAME/SLOT and the shape of NAME, only what this process holds of such a one is read, onto its device.
    Raises CheckpointError when they cannot be read.
    """
    try:
        parted = not path.is_file() and path.with_suffix("").is_dir()
        return _load_parts(path, like or {}) if parted else load_file(path)
    except (OSError, SafetensorError, CheckpointException) as error:
        raise CheckpointError(f"{path} is not readable: {error}") from None


def _load_parts(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    reader = HuggingFaceStorageReader(str(path.with_suffix("")))
    known = cast(dict[str, TensorStorageMetadata], reader.read_metadata().state_dict_metadata)
    tensors: dict[str, Tensor] = {}
    for name, meta in known.items():
        cut, dtype = like.get(name, like.get(name.rpartition("/")[0])), meta.properties.dtype
        if isinstance(cut, DTensor) and cut.shape == meta.size:
            tensors[name] = torch.empty_like(cut, dtype=dtype)
        else:
            tensors[name] = torch.empty(meta.size, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # which is what we ask for
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def load_json(path: Path) -> dict[str, Any]:
    """Values of one file."""
    values: dict[str, Any] = json.loads(read_text(path))
    return values


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
