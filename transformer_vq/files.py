"""Files that are whole or not there, and one line where one cannot be written.

A write replaces: the new file goes to a temporary name beside the old one, to the disk, and is renamed; a kill or a
full disk leaves the old one. Text is UTF-8, whatever the locale says, and locks need no particular system.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = frozenset({errno.ENOSPC, errno.EFBIG, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC)})
"""What only a write meets."""
REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EIO})


class WriteError(OSError):
    """A file cannot be written: the disk is full, a quota is used up, the place is read-only.

    The user's environment, not input: one line, exit code 1.
    """


@contextmanager
def writing(path: str | Path, need: int | None = None) -> Iterator[None]:
    """What the system says against a write inside the block becomes a WriteError that names `path`.

    need: bytes that are about to be written, for the message.
    """
    try:
        yield
    except Exception as error:
        if (text := complaint(error, path, need, FULL | REFUSED)) is None:
            raise
        raise WriteError(text) from error


def complaint(
    error: BaseException, path: str | Path | None = None, need: int | None = None, known: frozenset[int] = FULL
) -> str | None:
    """One line for a write that failed for a `known` reason; None for any other error."""
    number = _errno(error)
    if number not in known:
        return None
    path = path or getattr(error, "filename", None)
    return f"{path or 'a file'}: cannot be written: {os.strerror(number)}{room(error, path, need)}"


def room(error: BaseException, path: str | Path | None, need: int | None = None) -> str:
    """What is needed and what is free, in brackets, for a message about a disk that is full; else nothing."""
    known = [f"{in_units(need)} are needed"] if need else []
    if path and _errno(error) == errno.ENOSPC:
        known.append(f"{in_units(_free(path))} are free")
    return f" ({', '.join(known)})" if known else ""


def _errno(error: BaseException) -> int | None:
    """The system's number, which libraries in Rust leave in the text and numpy's `tofile` leaves out."""
    if isinstance(error, OSError):
        unwritten = error.errno is None and re.search(r"\d+ requested and \d+ written", str(error))
        return errno.ENOSPC if unwritten else error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))  # safetensors, tokenizers
    return int(match[1]) if match else None


def _free(path: str | Path) -> int:
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def in_units(count: int) -> str:
    """Bytes as people say them: 12 kB, 3.4 MB."""
    size, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


def write(path: Path, save: Callable[[Path], object], need: int | None = None) -> None:
    """Replace a file in one piece by what `save` writes into the path that it is given.  Raises WriteError."""
    temporary = path.with_name(f".{os.getpid()}-{path.name}")  # the suffix stays: some libraries go by it
    try:
        with writing(path, need):
            save(temporary)
            flush(temporary)
            temporary.replace(path)
            flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one piece.  Raises WriteError."""
    data = text.encode()
    write(path, lambda place: place.write_bytes(data), len(data))


def read_text(path: Path) -> str:
    """A text file of ours."""
    return path.read_text(encoding="utf-8")


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk (a folder can be opened on POSIX only)."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold `path` against other processes, waiting for up to `patience` seconds.

    Raises BlockingIOError when another holds it, WriteError on a full disk, OSError.
    """
    from filelock import FileLock, Timeout

    held = FileLock(path, timeout=patience)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except Timeout:
        raise BlockingIOError(errno.EAGAIN, "held by another process", str(path)) from None
    except OSError as error:
        if text := complaint(error, path):
            raise WriteError(text) from error
        raise
    try:
        yield
    finally:
        held.release()
