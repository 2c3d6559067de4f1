"""C++ beside the package, compiled once for the processor at hand and kept for later runs."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC")
COMPILERS = ("c++", "g++", "clang++")


class NotCompiled(RuntimeError):
    """There is no library, and why, in one line."""


@cache
def library(source: Path) -> ctypes.CDLL:
    """What `source` and the headers beside it compile to.  Raises NotCompiled without a compiler, or where it fails.

    Kept under `$XDG_CACHE_HOME/transformer_vq`, by a name that changes with source, compiler and processor.
    """
    if not source.exists():  # as in a model exported with its code, of which Transformers keeps Python's files alone
        raise NotCompiled(f"{source.name} is not beside the code")
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NotCompiled(f"needs a C++ compiler ({', '.join(COMPILERS)}, or what CXX names)")
    texts = [path.read_text("utf-8") for path in sorted(source.parent.iterdir()) if path.suffix in (".h", ".cpp")]
    made_of = "\n".join([*texts, compiler, *FLAGS, _processor()])
    name = f"{source.stem}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    for folder in (_kept(), Path(tempfile.gettempdir()) / f"transformer_vq-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not (folder / name).exists():
                _compile(compiler, source, folder / name)
            return ctypes.CDLL(str(folder / name))
        except OSError as error:  # a folder that cannot be written, or from which nothing is loaded
            why = str(error)
    raise NotCompiled(f"cannot keep or load what was compiled: {why}")


def _compile(compiler: str, source: Path, target: Path) -> None:
    """The whole file or none: others may be compiling it too."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        done = subprocess.run([compiler, *FLAGS, "-o", made, source], capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit status {done.returncode}"]
            raise NotCompiled(f"{compiler} fails on {source.name}: {lines[0]}")
        made.replace(target)


def _kept() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transformer_vq"


def _processor() -> str:
    """What tells processors apart that share a home folder."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    features = [line for line in lines if line.startswith(("flags", "Features"))]
    return "\n".join([platform.machine(), platform.processor(), *features[:1]])
