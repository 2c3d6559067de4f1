"""A checkpoint is whole or it is none: kills, flipped bits, cut files and full disks."""

import random
import subprocess
import sys
import time

import pytest
import torch
from forked import python

from transformer_vq import files
from transformer_vq.config import ConfigError
from transformer_vq.training import checkpoints as module
from transformer_vq.training.checkpoints import (
    CheckpointError,
    Checkpoints,
    load_tensors,
    save_json,
    save_tensors,
    verify,
)


def write(checkpoints: Checkpoints, step: int) -> None:
    folder = checkpoints.begin(step)
    save_tensors({"w": torch.full((64,), float(step))}, folder / "model.safetensors")
    save_json({"units": step}, folder / "trainer.json")
    checkpoints.commit(step)


def test_the_latest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (10, 20, 30, 40):
        write(checkpoints, step)
        if step == 10:
            checkpoints.mark_best(10, "loss", 1.0)
    assert checkpoints.steps() == [10, 30, 40] and checkpoints.last() == 40
    assert checkpoints.best() == {"step": 10, "loss": 1.0}
    checkpoints.mark_best(40, "loss", 0.5)
    assert checkpoints.steps() == [30, 40]
    assert [checkpoints.resolve(which).name[-2:] for which in ("best", "last", "30")] == ["40", "40", "30"]
    with pytest.raises(ConfigError, match="steps that have one: 30, 40"):
        checkpoints.resolve("20")


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 10)
    (checkpoints.path(20)).mkdir()
    save_tensors({"w": torch.zeros(3)}, checkpoints.path(20) / "model.safetensors")
    assert checkpoints.steps() == [10]


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.json", "manifest.json"])
@pytest.mark.parametrize("where", [0.0, 0.5, 0.999])
def test_a_flipped_bit_is_found(tmp_path, name, where):
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 10)
    verify(checkpoints.path(10))
    path = checkpoints.path(10) / name
    raw = bytearray(path.read_bytes())
    raw[int(where * len(raw))] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=name if name != "manifest.json" else "damaged|missing"):
        verify(checkpoints.path(10))


def test_a_cut_or_missing_file_is_found(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 10)
    path = checkpoints.path(10) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        verify(checkpoints.path(10))
    with pytest.raises(CheckpointError, match="not readable"):
        load_tensors(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        verify(checkpoints.path(10))


def test_a_full_disk_leaves_the_last_checkpoint_alone(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 10)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, "save_file", full)
        with pytest.raises(OSError, match=r"model\.safetensors: cannot be written: No space .*256 bytes are needed"):
            write(checkpoints, 20)
    assert checkpoints.steps() == [10]
    verify(checkpoints.path(10))
    write(checkpoints, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020"]  # what was half-written is gone


@pytest.mark.parametrize("call", range(7))
def test_a_stop_at_any_flush_leaves_a_whole_checkpoint(tmp_path, monkeypatch, call):
    """The moments between two flushes are what a power cut can choose from."""
    checkpoints, calls = Checkpoints(tmp_path), 0
    write(checkpoints, 10)
    flush = files.flush

    def stop_at(path):
        nonlocal calls
        calls += 1
        if calls > call:
            raise SystemExit
        flush(path)

    with monkeypatch.context() as patched:
        patched.setattr(files, "flush", stop_at)
        patched.setattr(module, "flush", stop_at)
        with pytest.raises(SystemExit):
            write(checkpoints, 20)
    last = Checkpoints(tmp_path).last()
    assert last == (10 if call < 6 else 20)
    verify(checkpoints.path(last))
    assert load_tensors(checkpoints.path(last) / "model.safetensors")["w"].unique().item() == last


def test_a_stop_while_deleting_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 10)

    def stop(path):
        (path / "model.safetensors").unlink()
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(module.shutil, "rmtree", stop)
        with pytest.raises(SystemExit):
            write(checkpoints, 20)
    assert checkpoints.steps() == [20]
    write(checkpoints, 30)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000030"]


def test_writing_a_step_again_replaces_it(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 10)
    (checkpoints.path(10) / "model.safetensors").write_bytes(b"damaged")
    write(checkpoints, 10)
    verify(checkpoints.path(10))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_kill_9_while_writing_loses_nothing(tmp_path):
    """A process writes checkpoints as fast as it can and is killed; what is left is whole, and the next one goes on."""
    script, output = tmp_path / "script.py", tmp_path / "output"
    script.write_text(
        "import sys, torch; from pathlib import Path\n"
        "from transformer_vq.training.checkpoints import *\n"
        "c = Checkpoints(Path(sys.argv[1]), keep=2)\n"
        "for step in range((c.last() or 0) + 1, 10**6):\n"
        "    folder = c.begin(step)\n"
        "    save_tensors({'w': torch.full((20000,), float(step))}, folder / 'model.safetensors')\n"
        "    c.commit(step)\n"
        "    print(step, flush=True)\n"
    )
    draw, last = random.Random(0), 0
    for _ in range(3):
        output.write_text("")
        process = python(str(script), str(tmp_path / "run"), output=output)
        while output.read_text().count("\n") < 3:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        process.join()
        reported = [int(line) for line in output.read_text().split()]
        found = Checkpoints(tmp_path / "run").steps()
        assert found and found[-1] >= max([last + 3, *reported])
        for step in found:
            folder = Checkpoints(tmp_path / "run").path(step)
            verify(folder)
            assert load_tensors(folder / "model.safetensors")["w"].unique().item() == step
        last = found[-1]


PART = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformer_vq.training.checkpoints import load_tensors, save_parts
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
whole = {"w": torch.arange(30.0).view(10, 3), "w/step": torch.tensor(7.0), "codes": torch.arange(4.0)}
whole |= {"w/slot": whole["w"] + 0.5, "odd": torch.ones(5, 3)}
save_parts(whole, folder / "model")
dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
mesh = init_device_mesh("cpu", (4,))
cut = distribute_tensor(torch.zeros(10, 3), mesh, [Shard(0)], src_data_rank=None)
read, request = [], HuggingFaceStorageReader._process_read_request
def count(self, file, wanted, planner):
    read.append(torch.Size(wanted.lengths).numel())
    request(self, file, wanted, planner)
HuggingFaceStorageReader._process_read_request = count
found = load_tensors(folder / "model.safetensors", {"w": cut, "codes": torch.zeros(4), "odd": cut})
rows = slice(3 * rank, 3 * rank + 3)
for name in ("w", "w/slot"):
    assert isinstance(found[name], DTensor) and torch.equal(found[name].to_local(), whole[name][rows]), name
for name in ("w/step", "codes", "odd"):
    assert torch.equal(found[name], whole[name]), name
assert sum(read) == 2 * whole["w"][rows].numel() + 1 + 4 + 15, read
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 3])
def test_a_process_reads_its_parts_alone(tmp_path, rank):
    command = [sys.executable, "-c", PART, str(tmp_path), str(rank)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
