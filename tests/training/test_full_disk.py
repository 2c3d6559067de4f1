"""A disk that is full, met by each writer of a run: one line, the file by name, and what stood stands."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from tiny_run import tiny_run
from toy_task import records, toy_config, train_toy

from transformer_vq import files
from transformer_vq.cli import run as command
from transformer_vq.config import save_config
from transformer_vq.files import WriteError
from transformer_vq.training import LanguageTask, checkpoints, run
from transformer_vq.training import run_folder as folder_module
from transformer_vq.training.checkpoints import Checkpoints, verify

WRITERS = {
    "config.yaml": r"config\.yaml: cannot be written: No space left on device",
    "metrics.jsonl": r"metrics\.jsonl: cannot be written: No space",
    "model.safetensors": r"model\.safetensors: cannot be written: No space .* are needed, .* free\); the checkpoint "
    r"of step 20 is [\d.]+ kB\. Last good checkpoint: .*step-00000010",
    "model-optimizer.safetensors": r"model-optimizer\.safetensors: cannot be written: .*the checkpoint of step 20 is ",
    "trainer.json": r"trainer\.json: cannot be written: .*the checkpoint of step 20 is ",
    "manifest.json": r"manifest\.json: cannot be written: .*the checkpoint of step 20 is ",
    "best.json": r"best\.json: cannot be written: No space",
    "tokenizer.json": r"tokenizer\.json: cannot be written: No space",
    "loss.png": r"loss\.png: cannot be written: No space .*Last good checkpoint: .*step-00000020",
    "summary.json": r"summary\.json: cannot be written: No space .*Last good checkpoint: .*step-00000020",
}


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """A language-model run with a checkpoint of step 10 of 20, its best."""
    place = tmp_path_factory.mktemp("half")
    run(settings(place, steps=10), quiet=True)
    return place


def settings(place: Path, **train):
    return tiny_run(place, eval__every=10, **{f"train__{key}": value for key, value in train.items()})


class Full:
    """From now on a disk has no room for the files of one name, beside what it replaces."""

    def __init__(self, name: str, number: int = errno.ENOSPC) -> None:
        self.name, self.number = name, number
        self.flush, self.open = files.flush, Path.open

    def at_flush(self, path: Path) -> None:
        if path.name.endswith(self.name):
            raise OSError(self.number, os.strerror(self.number))
        self.flush(path)

    def at_open(self, path: Path, *arguments, **options):
        if path.name == self.name and arguments[:1] == ("a",):
            raise OSError(self.number, os.strerror(self.number), str(path))
        return self.open(path, *arguments, **options)

    def patch(self, monkeypatch) -> None:
        monkeypatch.setattr(files, "flush", self.at_flush)
        monkeypatch.setattr(checkpoints, "flush", self.at_flush)
        monkeypatch.setattr(Path, "open", lambda path, *a, **k: self.at_open(path, *a, **k))


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_of_a_run(half, tmp_path, monkeypatch, capsys, name):
    place = tmp_path / "run"
    shutil.copytree(half / "run", place)
    config = settings(half, steps=20).model_copy(update={"run_dir": str(place)})
    before = {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}
    save_config(config, tmp_path / "config.yaml")
    with monkeypatch.context() as patched:
        Full(name).patch(patched)
        with pytest.raises(WriteError, match=WRITERS[name]):
            run(config, quiet=True, resume=True)
        capsys.readouterr()
        assert command(["train", str(tmp_path / "config.yaml"), "--resume", "--quiet"]) == 1
        lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and name in lines[0]
    stands = Checkpoints(place / "checkpoints")
    assert stands.steps()[0] == 10
    for step in stands.steps():
        verify(stands.path(step))
    assert [path.name for path in stands.folder.iterdir() if path.name.startswith(".")] == []
    assert [path.name for path in place.iterdir() if path.name.startswith(".")] == [".lock"]
    for kept in ("summary.json", "tokenizer.json"):
        assert (place / kept).read_bytes() == before[kept]
    monkeypatch.setattr(LanguageTask, "finish", lambda self, folder: None)  # plots are most of a tiny run's time
    assert run(config, quiet=True, resume=True)["steps"] == 20
    steps = [record["step"] for record in records(place) if record["split"] == "train"]
    assert steps == list(range(1, 21))


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO])
def test_other_ways_of_not_being_able_to_write(tmp_path, monkeypatch, number):
    config = toy_config(tmp_path / "run", checkpoint={"every": 5})
    train_toy(toy_config(tmp_path / "run", steps=5, checkpoint={"every": 5}))
    with monkeypatch.context() as patched:
        Full("model.safetensors", number).patch(patched)
        with pytest.raises(WriteError, match=rf"cannot be written: {os.strerror(number)}.*Last good .*step-00000005"):
            train_toy(config, resume=True)
    assert train_toy(config, resume=True)["steps"] == 20


def test_a_folder_that_cannot_be_written_to_is_bad_input(tmp_path, monkeypatch, capsys):
    def refuse(path, patience=0.0):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(folder_module, "lock", refuse)
    save_config(settings(tmp_path), tmp_path / "config.yaml")
    assert command(["train", str(tmp_path / "config.yaml"), "--quiet"]) == 2
    assert "cannot be written to: Permission denied" in capsys.readouterr().err


def test_a_small_disk(full_disk, tmp_path, capsys):
    """A file system of 3 MB that a run fills: after some checkpoints there is no room for the next."""
    sizes = {"model__width": 64, "model__quantizer": {"codes": 64}, "train__steps": 12}
    config = tiny_run(tmp_path, **sizes, checkpoint__keep=9, checkpoint__every=2)
    place = full_disk / "run"
    save_config(config.model_copy(update={"run_dir": str(place)}), tmp_path / "config.yaml")
    assert command(["train", str(tmp_path / "config.yaml"), "--quiet"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "No space left on device" in lines[0] and "Last good checkpoint" in lines[0], lines
    stands = Checkpoints(place / "checkpoints")
    steps = stands.steps()
    for step in steps:
        verify(stands.path(step))
    for step in steps[:-1]:
        shutil.rmtree(stands.path(step))  # the user makes room
    command(["train", str(place), "--resume", "--quiet"])
    assert stands.last() > steps[-1]
