"""What several folders of tests need."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from transformer_vq import files


@pytest.fixture
def full_disk(tmp_path) -> Iterator[Path]:
    """A file system of 3 MB. Skipped where none may be mounted."""
    place = tmp_path / "small"
    place.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "none", place], capture_output=True
        ).returncode
    except FileNotFoundError:
        mounted = 1
    if mounted:
        pytest.skip("a file system of 3 MB cannot be mounted here; needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def no_room(monkeypatch) -> None:
    """No disk takes anything any more: bytes that were written cannot be brought there."""

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "flush", full)
