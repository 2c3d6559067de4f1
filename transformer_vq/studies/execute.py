"""One run of a study, wherever an engine puts it: claim the folder, call the runner, record how it ended.

A run may end in any way, and none of them ends the study: done, diverged (a result), out_of_memory, failed,
interrupted; a process that is killed leaves `running`, which the next `study run` takes up from the last checkpoint.
"""

from __future__ import annotations

import os
import platform
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from transformer_vq.config import validate
from transformer_vq.files import WriteError, complaint, lock
from transformer_vq.machine import commit, cpu_name
from transformer_vq.studies.folder import RESULTS, read_status, write_status
from transformer_vq.studies.kinds import load

PATIENCE = 15.0  # seconds for the workers of a study that was killed to notice and let go of their runs
PACKAGES = ("transformer-vq", "torch", "numpy", "accelerate", "pydantic")
ENDINGS = {  # by the name of an exception's class, so that telling them apart imports neither torch nor training
    "TrainingDiverged": "diverged",
    "TrainingInterrupted": "interrupted",
    "MemoryError": "out_of_memory",
    "OutOfMemoryError": "out_of_memory",
}


@dataclass(frozen=True)
class Job:
    """What travels to a worker, a cluster's node included: plain values only."""

    folder: str
    config: dict[str, Any]
    schema: str
    runner: str
    command: str
    cwd: str
    path: tuple[str, ...]
    """Where the study's process finds modules, for estimators of the user's own."""


def execute(job: Job) -> str:
    """Run it in this process, or take it up where it was left; returns its state, whatever the run raises."""
    folder = Path(job.folder)
    try:
        with chdir(job.cwd), lock(folder / ".attempt", PATIENCE):
            known = read_status(folder)["state"]
            if known in RESULTS:
                return str(known)
            sys.path += [place for place in job.path if place not in sys.path]
            attempt = Attempt(folder, job.command)
            with printing_into(folder / "log.txt"), attempt:
                settings = validate(job.config, load(job.schema))
                load(job.runner)(settings, resume=True, quiet=True)
            return attempt.state
    except BlockingIOError:
        return "busy"  # another engine has it
    except OSError as error:
        if not isinstance(error, WriteError) and complaint(error) is None:
            raise
        sys.exit(1)  # not even its status can be kept: the engine finds that out, and says so


class Attempt:
    """Writes `running` on the way in, and on the way out how it ended. Swallows the run's exceptions, not Ctrl-C."""

    def __init__(self, folder: Path, command: str) -> None:
        self.folder, self.command, self.state = folder, command, "running"
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        known = read_status(self.folder)
        write_status(
            self.folder,
            state="running",
            error=None,
            attempts=known.get("attempts", 0) + 1,
            seconds_before=known.get("seconds", 0.0),
            started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            command=self.command,
            versions=software(),
            hardware=hardware(),
            commit=commit(),
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.state = ending(error)
        if error is not None:
            traceback.print_exception(error)
        seconds = read_status(self.folder)["seconds_before"] + time.monotonic() - self._start
        text = None if error is None else " ".join(f"{type(error).__name__}: {error}".split())[:500]
        write_status(self.folder, state=self.state, error=text, seconds=round(seconds, 2), hardware=hardware())
        return isinstance(error, Exception) and self.state != "interrupted"


def ending(error: BaseException | None) -> str:
    """The state that an exception stands for; done when there is none."""
    if error is None:
        return "done"
    for cls in type(error).__mro__:
        if cls.__name__ in ENDINGS:
            return ENDINGS[cls.__name__]
    if "can't allocate memory" in str(error):  # torch's CPU allocator raises a plain RuntimeError
        return "out_of_memory"
    return "failed" if isinstance(error, Exception) else "interrupted"


@contextmanager
def printing_into(path: Path) -> Iterator[None]:
    """Standard output and error of this process, libraries in C included, go to the end of a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.dup2(file, 1)
        os.dup2(file, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, original in zip((1, 2), saved, strict=True):
            os.dup2(original, number)
            os.close(original)
        os.close(file)


def software() -> dict[str, str]:
    """Versions of what matters."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def hardware() -> dict[str, Any]:
    """What the run ran on. A run that never loaded torch has used neither its threads nor its GPUs."""
    found: dict[str, Any] = {"cpu": cpu_name(), "cores": os.cpu_count()}
    if hasattr(os, "sched_getaffinity"):
        found["cores"] = len(os.sched_getaffinity(0))
    if torch := sys.modules.get("torch"):
        found |= {"threads": torch.get_num_threads()}
        found |= {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
    return found
