"""C++ beside the package, compiled once for the processor at hand and kept for later runs."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC")
COMPILERS = ("c++", "g++", "clang++")


class NotCompiled(RuntimeError):
    """There is no library, and why, in one line."""


def library(source: Path) -> ctypes.CDLL:
    """What `source` and the headers beside it compile to.  Raises NotCompiled without a compiler, or where it fails.

    Kept under `$XDG_CACHE_HOME/transformer_vq`, by a name that changes with sources, compiler and processor; where that
    cannot be written, compiled anew by each process. Tried once in a process: what could not be had stays away.
    """
    found = attempt(source)
    if isinstance(found, str):
        raise NotCompiled(found)
    return found


def compiles(source: Path) -> bool:
    """Whether there is a library."""
    return not isinstance(attempt(source), str)


def entry(source: Path, name: str, dtype: object) -> Any:
    """A function of a library, for numbers of a type of torch's."""
    return getattr(library(source), f"{name}_{str(dtype).removeprefix('torch.')}")


@cache
def attempt(source: Path) -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not source.exists():  # as in a model exported with its code, of which Transformers keeps Python's files alone
        return f"{source.name} is not beside the code"
    command = shlex.split(os.environ.get("CXX", "")) or [name for name in COMPILERS if shutil.which(name)][:1]
    if not command:
        return f"needs a C++ compiler ({', '.join(COMPILERS)}, or what CXX names)"
    if shutil.which(command[0]) is None:
        return f"CXX = {command[0]}: there is no such command"
    try:
        return _kept(command, source)
    except NotCompiled as error:
        return str(error)
    except (OSError, RuntimeError):  # no home, or one in which nothing can be written or loaded from
        pass
    try:
        with tempfile.TemporaryDirectory(prefix="transformer_vq-", ignore_cleanup_errors=True) as folder:
            return ctypes.CDLL(str(_compiled(command, source, Path(folder) / f"{source.stem}.so")))
    except (OSError, RuntimeError) as error:
        return str(error)


def _kept(command: list[str], source: Path) -> ctypes.CDLL:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transformer_vq"
    folder.mkdir(parents=True, exist_ok=True)
    texts = [path.read_text("utf-8") for path in sorted(source.parent.iterdir()) if path.suffix in (".h", ".cpp")]
    made_of = "\n".join([*texts, *command, *FLAGS, _version(command[0]), _processor()])
    target = folder / f"{source.stem}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    return ctypes.CDLL(str(target if target.exists() else _compiled(command, source, target)))


def _compiled(command: list[str], source: Path, target: Path) -> Path:
    """The whole file or none: others may be compiling it too."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        whole = [*command, *FLAGS, "-o", str(made), str(source)]
        done = subprocess.run(whole, capture_output=True, encoding="utf-8", errors="replace", check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit status {done.returncode}"]
            raise NotCompiled(f"{command[0]} fails on {source.name}: {lines[0]}")
        return made.replace(target)


def _version(compiler: str) -> str:
    """What changes when a compiler is replaced, without asking it."""
    found = Path(str(shutil.which(compiler))).resolve()
    return f"{found} {found.stat().st_mtime_ns}"


def _processor() -> str:
    """What tells processors apart that share a home folder."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    features = [line for line in lines if line.startswith(("flags", "Features"))]
    return "\n".join([platform.machine(), platform.processor(), *features[:1]])
