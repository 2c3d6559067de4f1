"""What people copy to start a run: read by Accelerate itself, and started where a CPU is enough."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from tiny_run import tiny_run

from transformer_vq.config import save_config
from transformer_vq.training import run
from transformer_vq.training.run_folder import RunFolder

LAUNCH = Path(__file__).parents[1] / "scripts" / "launch"
PROCESSES = {"gpu-1": (1, 1), "gpus-8": (1, 8), "gpus-2x8": (2, 16), "fsdp-8": (1, 8), "context-8": (1, 8)}
SBATCH = {  # of sbatch(1), those that are used, and what they take
    "job-name": r"[\w-]+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "time": r"\d+:\d\d:\d\d",
    "signal": r"B:(USR1|TERM)@\d+",
    "requeue": None,
    "open-mode": r"append|truncate",
    "output": r"[\w%.-]+",
}


def test_every_file_is_tested():
    assert {path.stem for path in LAUNCH.glob("*.yaml")} == set(PROCESSES)


@pytest.mark.parametrize("name", PROCESSES)
def test_accelerate_reads_its_config(name):
    """Its loader refuses keys that it does not know."""
    path, (machines, processes) = LAUNCH / f"{name}.yaml", PROCESSES[name]
    config = load_config_from_file(str(path))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    line = ["--config_file", str(path), "--machine_rank", "1", "--main_process_ip", "host", "-m", "transformer_vq"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args([*line, "train", "lm/tiny"]))
    assert (args.num_machines, args.num_processes, args.mixed_precision) == (machines, processes, "no")
    assert bool(args.multi_gpu) is (processes > 1) and not args.use_fsdp
    assert args.training_script_args == ["train", "lm/tiny"]


@pytest.mark.parametrize("name", ["slurm.sh", "elastic.sh"])
def test_bash_reads_the_scripts(name):
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)
    none = subprocess.run(["bash", str(LAUNCH / name)], capture_output=True, text=True, check=False)
    assert none.returncode != 0 and "CONFIG [KEY=VALUE ...]" in none.stderr


def test_sbatch_would_read_the_directives():
    lines = (LAUNCH / "slurm.sh").read_text(encoding="utf-8").splitlines()
    code = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert directives and directives == [line for line in lines[:code] if line.startswith("#SBATCH")], "before any code"
    for line in directives:
        key, _, value = line.removeprefix("#SBATCH --").partition("=")
        kind = SBATCH[key]
        assert value == "" if kind is None else re.fullmatch(kind, value), line


@pytest.mark.slow
@pytest.mark.distributed
def test_a_job_that_is_preempted_is_queued_again_and_goes_on(tmp_path):
    """With stand-ins for srun and scontrol, and two processes of this machine."""
    tools = tmp_path / "bin"
    tools.mkdir()
    here = Path(sys.executable).parent
    for name, text in {
        "srun": 'exec "$@"',
        "scontrol": f'[ "$1" = show ] && echo localhost || echo "$@" >> {tmp_path}/scontrol',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (tools / name).chmod(0o755)
    config = tiny_run(tmp_path, train__steps=80, checkpoint__every=None, train__micro_batch=1)
    save_config(config, tmp_path / "config.yaml")
    environment = {**os.environ, "PATH": f"{tools}:{here}:{os.environ['PATH']}", "PROCESSES": "2", "PORT": "29713"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "one", "SLURM_NNODES": "1", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(LAUNCH / "slurm.sh"), str(tmp_path / "config.yaml")]
    metrics, folder = tmp_path / "run" / "metrics.jsonl", RunFolder(tmp_path / "run")
    with subprocess.Popen(command, env=environment) as job:
        while job.poll() is None and not metrics.is_file():
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=200) == 0  # of scontrol
    stopped = folder.checkpoints.last()
    assert stopped is not None and 0 < stopped < 80
    assert (tmp_path / "scontrol").read_text(encoding="utf-8") == "requeue 7\n"
    again = subprocess.run(command, env=environment, timeout=400, check=False)
    assert again.returncode == 0
    assert (folder.summary() or {})["steps"] == 80 and (folder.summary() or {})["processes"] == 2
    assert (tmp_path / "scontrol").read_text(encoding="utf-8") == "requeue 7\n", "not once more"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_machine_fewer_goes_on_from_the_last_checkpoint(tmp_path):
    """Two machines, which are two agents of one process here; one is killed, the other goes on alone: the same run."""
    settings = {"train__steps": 120, "train__precision": "fp64", "checkpoint__every": 5, "train__micro_batch": 1}
    save_config(tiny_run(tmp_path, **settings), tmp_path / "config.yaml")
    straight = tiny_run(tmp_path, "straight", **settings)
    run(straight, quiet=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment |= {"MACHINES": "1:2", "PROCESSES": "1", "HOST": "localhost", "PORT": "29714"}
    command = ["bash", str(LAUNCH / "elastic.sh"), str(tmp_path / "config.yaml")]
    folder, agents = RunFolder(tmp_path / "run"), []
    try:
        for _ in range(2):
            agents.append(subprocess.Popen(command, env=environment, start_new_session=True))
            time.sleep(8)  # the first one keeps the rendezvous
        while (folder.checkpoints.last() or 0) < 10:
            assert agents[0].poll() is None
            time.sleep(0.05)
        for child in psutil.Process(agents[1].pid).children(recursive=True):
            child.kill()
        agents[1].kill()
        assert agents[0].wait(timeout=400) == 0
    finally:
        for agent in agents:
            agent.terminate()
            agent.wait()
    got, want = folder.summary() or {}, RunFolder(tmp_path / "straight").summary() or {}
    assert (got["processes"], got["steps"]) == (1, 120)
    assert got["test"]["bits_per_byte"] == pytest.approx(want["test"]["bits_per_byte"], rel=1e-8)
