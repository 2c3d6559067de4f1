"""Processes side by side, as `torchrun` starts them, but forked from one that has imported the library already.

Importing PyTorch and its friends takes longer than most of what these processes do. The real launcher is started in
tests/images/test_task.py and, slow, in tests/test_launch.py and tests/training/test_soak.py.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.distributed import TCPStore

TESTS = Path(__file__).parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["transformer_vq.training.loop", "torch._dynamo"])


def torchrun(processes: int, *arguments: str, fails: bool = False, timeout: float = 280, **environment: str) -> str:
    """Run a script with arguments once a process, and return what they print.

    The first that fails ends the others.  `fails`: one must; else none may, and a failure shows the end of the output.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    common |= {"OMP_NUM_THREADS": 1, **environment}
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as output:
        crew = [python(*arguments, output=output.name, **common, RANK=r, LOCAL_RANK=r) for r in range(processes)]
        end, running = time.monotonic() + timeout, list(crew)
        while running and time.monotonic() < end and not any(process.exitcode for process in crew):
            wait([process.sentinel for process in running], timeout=end - time.monotonic())
            running = [process for process in crew if process.exitcode is None]
        late = bool(running) and not any(process.exitcode for process in crew)
        for process in running:
            process.terminate()
        for process in running:
            process.join(10)
            process.kill()
            process.join()
        said = output.read()
    assert not late, (
        f"after {timeout:g} seconds they are still at it: {said[-3000:]}"
    )  # whether they should fail or not
    assert any(process.exitcode for process in crew) is fails, said[-3000:]
    return said


def python(*arguments: str, output: str | Path, **environment: object) -> BaseProcess:
    """Start `python SCRIPT ARGUMENTS` with more in its environment; what it prints is added to a file."""
    text = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    process = CONTEXT.Process(target=_work, args=(arguments, text, str(output)))
    process.start()
    return process


def _work(arguments: tuple[str, ...], environment: dict[str, str], output: str) -> None:
    """In the new process: become what `python SCRIPT ARGUMENTS` would be."""
    os.environ.clear()
    os.environ.update(environment)
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = list(arguments)
    sys.path[:0] = [str(Path(arguments[0]).parent), str(TESTS)]
    runpy.run_path(arguments[0], run_name="__main__")
