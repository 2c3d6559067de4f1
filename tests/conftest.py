"""What several folders of tests need."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from transformer_vq import files

LONG = (
    "test_triton.py",
    "test_ring.py",
    "test_distributed.py",
    "test_sharding.py",
    "test_context.py",
    "test_crew.py",
    "test_memory.py",
    "test_compiled.py",
    "test_fake_device.py",
    "test_streams.py",
    "test_inspect.py",
    "test_site.py",
    "test_notebook.py",
)
"""Files that take half a minute or more: started first, so that no worker is left with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files; within a file nothing changes."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """Accelerate leaves variables in it (LOCAL_WORLD_SIZE) that later tests of the same worker would believe."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


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
