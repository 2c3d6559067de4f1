"""Two real processes give what one process gives on the same global batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import TESTS, torchrun
from helpers import assert_same
from tiny_run import tiny_run

from transformer_vq.config import ConfigError
from transformer_vq.training import run
from transformer_vq.training.checkpoints import load_tensors
from transformer_vq.training.distributed import asked_for, checksum

PATH = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
CASES = {
    "fp64": {"train__precision": "fp64", "train__micro_batch": 1, "data__document_boundaries": "reset"},
    "fp32": {"train__micro_batch": 1, "train__optimizer": "muon", "train__lr": 0.001},
    "streams": {"train__precision": "fp64", "train__micro_batch": 2, "data__order": "streams", "checkpoint__every": 10},
    "kmeans": {
        "train__precision": "fp64",
        "train__micro_batch": 1,
        "model__quantizer": {"codes": 8, "init": "kmeans", "start_step": 3, "ema": 0.8},
    },
    "replaced": {
        "train__precision": "fp64",
        "train__micro_batch": 1,
        "model__quantizer": {"codes": 8, "init": "kmeans", "dead_code_threshold": 10.0, "ema": 0.8},
    },
    "uneven": {"train__precision": "fp64", "train__batch_size": 3, "model__per_layer": {"1": {"kind": "fsq"}}},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Every case trained by two processes, in one launch: runs follow one another, codebooks compared at every step."""
    folder = tmp_path_factory.mktemp("two")
    configs = [tiny_run(folder, name, **settings).model_dump(mode="json") for name, settings in CASES.items()]
    (folder / "configs.json").write_text(json.dumps(configs))
    torchrun(2, str(TESTS / "two_processes.py"), str(folder / "configs.json"))
    return folder


def losses(run_dir: Path) -> dict[str, torch.Tensor]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "bits_per_byte", "grad_norm", "loss_commit", "layer0/norm_ratio")
    return {n: torch.tensor([r[n] for r in records if r["split"] == "train"], dtype=torch.float64) for n in names}


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_tensors(run_dir / "checkpoints" / "step-00000020" / "model.safetensors")


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(two, tmp_path, case):
    config = tiny_run(tmp_path, case, **CASES[case])
    summary = run(config, quiet=True)
    got = json.loads((two / case / "summary.json").read_text())
    assert (got["processes"], got["tokens"], got["steps"]) == (2, summary["tokens"], 20)
    assert_same(losses(two / case), losses(tmp_path / case), rtol=1e-4 if case == "fp32" else 1e-8)
    if case != "fp32":  # Adam turns rounding into steps
        ours, theirs = weights(tmp_path / case), weights(two / case)
        assert_same(theirs, ours, rtol=1e-8)
        if case == "replaced":
            assert (ours["layers.0.quantizer.ema_count"] == 10.0).any()
        assert got["test"]["bits_per_byte"] == pytest.approx(summary["test"]["bits_per_byte"], rel=1e-8)


@pytest.mark.distributed
def test_each_process_keeps_its_own_streams(two):
    states = [
        load_tensors(two / "streams" / "checkpoints" / "step-00000010" / f"carried-{r}.safetensors") for r in (0, 1)
    ]
    assert states[0].keys() == states[1].keys()
    assert not torch.equal(states[0]["0.0.AttentionState.codes"], states[1]["0.0.AttentionState.codes"])


@pytest.mark.distributed
def test_drift_and_errors_are_told_by_every_process(tmp_path):
    """Codebooks that differ stop the run; bad input ends both processes at once, with one line."""
    script = tmp_path / "drift.py"
    script.write_text(
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from tiny_run import tiny_run\n"
        "from transformer_vq.config import ConfigError\n"
        "from transformer_vq.training import LanguageTask, run\n"
        "from transformer_vq.training.distributed import ProcessesDiffer\n"
        "folder, rank = Path(sys.argv[1]), int(os.environ['RANK'])\n"
        "try:\n"
        "    run(tiny_run(folder, 'few', train__batch_size=1), quiet=True)\n"
        "except ConfigError as error:\n"
        "    (folder / f'few-{rank}').write_text(str(error))\n"
        "try:\n"
        "    run(tiny_run(folder, 'missing', data__source='/nowhere.txt'), quiet=True)\n"
        "except ConfigError as error:\n"
        "    (folder / f'missing-{rank}').write_text(str(error))\n"
        "update = LanguageTask.after_update\n"
        "def drift(self, player):\n"
        "    update(self, player)\n"
        "    self.model.layers[1].quantizer.ema_sum[0, 0, 0] += rank * 1e-7\n"
        "LanguageTask.after_update = drift\n"
        "try:\n"
        "    run(tiny_run(folder, 'drift'), quiet=True)\n"
        "except ProcessesDiffer as error:\n"
        "    (folder / f'drift-{rank}').write_text(str(error))\n"
    )
    torchrun(2, str(script), str(tmp_path))
    for rank in (0, 1):
        assert "batch_size = 1: must be at least 2" in (tmp_path / f"few-{rank}").read_text()
        assert "/nowhere.txt" in (tmp_path / f"missing-{rank}").read_text()
        assert "layers.1.quantizer.ema_sum on process 1" in (tmp_path / f"drift-{rank}").read_text()


@pytest.mark.distributed
def test_a_signal_or_a_full_disk_of_one_process_is_everyones(tmp_path):
    """Rank 1 alone gets SIGUSR1, then SIGTERM, then has no room for what it carries; both agree, and go on."""
    script = tmp_path / "signals.py"
    script.write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tiny_run import tiny_run\n"
        "from transformer_vq.files import WriteError\n"
        "from transformer_vq.training import LanguageTask, TrainingInterrupted, run, snapshot\n"
        "folder, rank = Path(sys.argv[1]), int(os.environ['RANK'])\n"
        "config = tiny_run(folder, data__order='streams', checkpoint__keep=9, train__micro_batch=1)\n"
        "set_step, save = LanguageTask.set_step, snapshot.save_tensors\n"
        "def signalled(self, step):\n"
        "    if rank == 1 and step in (4, 8):\n"
        "        os.kill(os.getpid(), signal.SIGUSR1 if step == 4 else signal.SIGTERM)\n"
        "    set_step(self, step)\n"
        "def full(tensors, path):\n"
        "    if rank == 1:\n"
        "        raise WriteError(f'{path}: cannot be written: No space')\n"
        "    save(tensors, path)\n"
        "def attempt(name, resume):\n"
        "    try:\n"
        "        run(config, quiet=True, resume=resume)\n"
        "    except (TrainingInterrupted, WriteError) as error:\n"
        "        (folder / f'{name}-{rank}').write_text(str(error))\n"
        "LanguageTask.set_step = signalled\n"
        "attempt('term', False)\n"
        "LanguageTask.set_step, snapshot.save_tensors = set_step, full\n"
        "attempt('full', True)\n"
        "snapshot.save_tensors = save\n"
        "attempt('none', True)\n"
    )
    torchrun(2, str(script), str(tmp_path))
    for rank in (0, 1):
        assert "stopped after step 9 of 20" in (tmp_path / f"term-{rank}").read_text()
        error = (tmp_path / f"full-{rank}").read_text()
        assert "carried-1.safetensors: cannot be written" in error and "Last good checkpoint: " in error
        assert error.endswith("step-00000009") and not (tmp_path / f"none-{rank}").exists()
    folders = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir()}
    assert folders == {"step-00000005", "step-00000009", "step-00000020"}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 20


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_checksum_sees_one_changed_bit(dtype):
    tensor = torch.arange(12).reshape(3, 4).t().to(dtype)  # not contiguous
    before = checksum(tensor)
    assert before.dtype == torch.int64 and torch.equal(before, checksum(tensor.clone()))
    changed = tensor.contiguous()
    changed.view(torch.uint8).flatten()[5] ^= 1
    assert checksum(changed) != before
    assert checksum(torch.zeros((), dtype=dtype)) == 0


def test_what_the_launcher_was_asked_for(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert asked_for() == 1
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert asked_for() == 3


def test_a_port_in_use_is_one_line(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        with monkeypatch.context() as patched:
            for name, value in {**place, "MASTER_PORT": str(port)}.items():
                patched.setenv(name, value)
            with pytest.raises(ConfigError, match=f"^MASTER_PORT = {port}: something else on this machine"):
                run(tiny_run(tmp_path), quiet=True)
    assert not (tmp_path / "run").exists()
    assert run(tiny_run(tmp_path), quiet=True)["processes"] == 1, "nothing is left behind"


@pytest.mark.distributed
def test_accelerates_silent_launcher_is_stopped(tmp_path):
    """`accelerate launch --cpu --num_processes 2` starts one process; the run says so and writes nothing."""
    script = tmp_path / "one.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom tiny_run import tiny_run\nfrom transformer_vq.training import run\n"
        "run(tiny_run(Path(sys.argv[1])), quiet=True)\n"
    )
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        str(script),
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": PATH, "HF_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0 and "asked for 2 processes and this run has 1" in done.stderr
    assert not (tmp_path / "run").exists()
