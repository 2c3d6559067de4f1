"""Which machine and which commit a number comes from, and what memory it took. Whoever asks need not load torch."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path


def cpu_name() -> str:
    """Like `Intel(R) Xeon(R) Processor @ 2.50GHz`."""
    return _cpu().get("model name") or platform.processor() or platform.machine()


def cpu_flags() -> tuple[str, list[str]]:
    """Like `AuthenticAMD` or `GenuineIntel`, and what it can do, as Linux names it; nothing where it is not told."""
    found = _cpu()
    return found.get("vendor_id", ""), found.get("flags", "").split()


def _cpu() -> dict[str, str]:
    """What Linux says of the first core."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    pairs = [line.partition(":") for line in text.partition("\n\n")[0].splitlines()]
    return {name.strip(): value.strip() for name, _, value in pairs}


def commit() -> str | None:
    """The commit that the package is a checkout of, with `+` when files differ from it; None outside a checkout."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None
    git = ["git", "-C", str(folder)]
    try:
        name = subprocess.check_output([*git, "rev-parse", "--short=12", "HEAD"], encoding="utf-8")
        differs = [*git, "status", "--porcelain", "--untracked-files=no", "--", "transformer_vq"]
        changed = subprocess.check_output(differs, encoding="utf-8", errors="replace")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return name.strip() + ("+" if changed.strip() else "")


def peak_resident() -> int:
    """Bytes of memory that this process has held at most, since it was started."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, where getrusage starts with the peak of the parent process
        (line,) = (line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 2**10
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes
