"""What a file holds, told by its first bytes and not by its name, and the text in it.

    packed     gzip, bzip2, xz, lzma, Zstandard, one around another too: unpacked on the way
    archives   zip, tar: every member is a document; nothing is written to the disk
    UTF-16/32  with a byte-order mark: converted to UTF-8, of which a mark is left out
    rows       JSON lines, parquet, Arrow: a ConfigError says how they are read
    the rest   a ConfigError that names file and kind

Text is what is none of the others: of its first 64 KiB at most one byte in a hundred is a control character (white
space, backspace, escape and zero aside), and at most one in four is zero. So Latin-1 is text, and so are files joined
by zero bytes; UTF-16 without a mark is not, nor are programs, weights and noise.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Self, cast

import numpy as np

from transformer_vq.config import ConfigError
from transformer_vq.config.explain import one_line
from transformer_vq.data.documents import Piece, read_stream

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

HEAD = 1 << 16
"""Bytes that decide."""
MOST_LAYERS = 4
"""Of packing, one around another."""

UNREADABLE = (
    *(OSError, EOFError, ValueError, NotImplementedError, RuntimeError, lzma.LZMAError, zlib.error, zstd.ZstdError),
    *(tarfile.TarError, zipfile.BadZipFile),
)
"""What damaged and encrypted files raise."""

OPEN: dict[str, Callable[[Any], Any]] = {
    "gzip": gzip.open,
    "bzip2": bz2.open,
    "xz": lzma.open,
    "lzma": lzma.open,
    "Zstandard": zstd.open,
}
SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".lzma": "lzma", ".zst": "Zstandard", ".zstd": "Zstandard"}
ROWS = {b"PAR1": "parquet", b"ARROW1": "Arrow", b"\xff\xff\xff\xff": "Arrow"}
ROW_SUFFIXES = {".jsonl": "JSON lines", ".ndjson": "JSON lines", ".parquet": "parquet", ".arrow": "Arrow"}
BINARY = {
    b"\x7fELF": "a program",
    b"MZ\x90": "a program",
    b"\xcf\xfa\xed\xfe": "a program",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
    b"%PDF-": "PDF",
    b"\x93NUMPY": "an array of numpy",
    b"\x89HDF": "HDF5",
    b"SQLite format 3\0": "a database",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x1f\x9d": "packed by compress",
    b"\x04\x22\x4d\x18": "packed by lz4",
    b"\x80\x02": "a pickle",
    b"\x80\x04\x95": "a pickle",
    b"\x80\x05\x95": "a pickle",
    b"GGUF": "weights",
    b"ID3": "music",
    b"OggS": "music",
    b"fLaC": "music",
}
MARKS = {  # the longer first: UTF-32 begins as UTF-16 does
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
DOCUMENTS = {"[Content_Types].xml": "an Office document", "mimetype": "a document", "META-INF/MANIFEST.MF": "a jar"}
_CONTROL = np.isin(np.arange(256), [*range(1, 8), *range(14, 27), *range(28, 32), 127])

Role = Literal["text", "packed", "archive", "rows", "binary"]


class Format(NamedTuple):
    """What a stream holds."""

    role: Role
    name: str
    """gzip, zip, parquet, utf-16, ...; of plain text '', of binary content some words."""


class Member(NamedTuple):
    """A document in a file."""

    name: str
    """In the archive; '' in a file that is none."""
    size: int | None
    """Bytes, where they are known without unpacking."""
    format: Format


def identify(head: bytes, name: str = "") -> Format:
    """The format of what begins with `head`, HEAD bytes or all there are. A name adds rows that cannot be told."""
    if packing := _packing(head):
        return Format("packed", packing)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return Format("archive", "zip")
    if _is_tar(head):
        return Format("archive", "tar")
    for magic, what in ROWS.items():
        if head.startswith(magic):
            return Format("rows", what)
    for magic, what in BINARY.items():
        if head.startswith(magic):
            return Format("binary", what)
    if (head[:4] == b"RIFF" and head[8:12] in (b"WEBP", b"WAVE", b"AVI ")) or head[4:8] == b"ftyp":
        return Format("binary", "a picture, sound or film")
    for mark, encoding in MARKS.items():
        if head.startswith(mark) and (encoding == "utf-8-sig" or _decodes(head, encoding)):
            return Format("text", encoding)
    if why := _no_text(head):
        return Format("binary", why)
    bare = Path(name.removesuffix(suffix) if (suffix := Path(name).suffix.lower()) in SUFFIXES else name)
    rows = ROW_SUFFIXES.get(bare.suffix.lower()) or ("JSON lines" if _are_json_lines(head) else None)
    return Format("rows", rows) if rows else Format("text", "")


def members(path: Path) -> list[Member]:
    """The documents of a file: those of an archive, or the one that it is.  Raises ConfigError for what is no text."""
    try:
        with unpacked(path) as (stream, found, layers):
            if found.role != "archive":
                return [Member("", None if layers or found.name else path.stat().st_size, found)]
            return [
                Member(name, size, identify(inner.peek(HEAD)[:HEAD], name))
                for name, size, inner in _walk_archive(path, stream, found.name, layers)
                if size
            ]
    except ConfigError:
        raise
    except UNREADABLE as error:
        raise unreadable(path, error) from None


def check(path: Path, member: Member) -> None:
    """Raise ConfigError for a document that is no text, saying how it is read if it is anything."""
    where = f"{path}/{member.name}" if member.name else path
    role, name = member.format
    if role == "rows":
        at = f"hf:{path}" if not member.name else "hf:FOLDER, once they are unpacked"
        raise ConfigError(f"data.source: {where} holds rows ({name}), no text; rows are read with {at}")
    if role == "binary":
        raise ConfigError(
            f"data.source: {where} is no text but {name}; move it away (text: UTF-8 or other bytes with few control "
            "characters, UTF-16 with a byte-order mark, or such in gzip, bzip2, xz, Zstandard, zip, tar)"
        )
    if role != "text":
        raise ConfigError(f"data.source: {where} is {name} inside an archive; unpack the outer one")


def read_file(path: Path, only: frozenset[str] | None = None) -> Iterator[Piece]:
    """A text file as one document; an archive as a document a member, of those named in `only` if given.

    Raises ConfigError where it cannot be read.
    """
    try:
        with unpacked(path) as (stream, found, layers):
            if found.role != "archive":
                yield from read_stream(_as_utf8(stream, found.name), str(path))
                return
            for name, size, inner in _walk_archive(path, stream, found.name, layers):
                if size and (only is None or name in only):
                    encoding = identify(inner.peek(HEAD)[:HEAD]).name
                    yield from read_stream(_as_utf8(inner, encoding), f"{path}/{name}")
    except ConfigError:
        raise
    except UNREADABLE as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: Exception) -> ConfigError:
    """One line that names file and fault."""
    return ConfigError(f"data.source: {path} is not readable: {one_line(error) or type(error).__name__}")


@contextmanager
def unpacked(path: Path) -> Iterator[tuple[io.BufferedReader, Format, int]]:
    """A file without its packing, what is in it, and how many packings there were.

    Raises ConfigError for a packed file's name over something else.
    """
    with path.open("rb") as file:
        stream, found, layers = unpack(file, path.name)
        promised = SUFFIXES.get(path.suffix.lower())
        if promised and not layers:
            raise ConfigError(
                f"data.source: {path} is not readable: named {path.suffix}, it does not begin as {promised} does; "
                "rename it if it is plain text"
            )
        yield stream, found, layers


def unpack(file: IO[bytes], name: str) -> tuple[io.BufferedReader, Format, int]:
    """A stream without its packing, what is in it, and how many packings there were."""
    for layers in range(MOST_LAYERS):
        stream = io.BufferedReader(cast(Any, _Whole(file)), HEAD)
        found = identify(stream.peek(HEAD)[:HEAD], name)
        if found.role != "packed":
            return stream, found, layers
        file = OPEN[found.name](stream)
    raise OSError(f"packed more than {MOST_LAYERS} times over")


class _Whole(io.RawIOBase):
    """A stream whose reads are short only at its end, so that a peek shows all that was asked for."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        done = 0
        while done < len(buffer) and (block := self._file.read(len(buffer) - done)):
            buffer[done : done + len(block)] = block
            done += len(block)
        return done


class _Decoded:
    """A stream in another encoding, as UTF-8."""

    def __init__(self, stream: IO[bytes], encoding: str) -> None:
        self._stream, self._decoder = stream, codecs.getincrementaldecoder(encoding)()

    def read(self, size: int) -> bytes:
        while True:
            block = self._stream.read(size)
            text = self._decoder.decode(block, final=not block)
            if text or not block:
                return text.encode()


class _StrictTar(tarfile.TarInfo):
    """A damaged header in the middle, or no mark of the end, is an error; the library takes both for the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # not in the stubs; zeros: the end as it should be
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error or type(error).__name__}") from None


def _walk_archive(
    path: Path, stream: io.BufferedReader, kind: str, layers: int
) -> Iterator[tuple[str, int, io.BufferedReader]]:
    """Name, size and content of every file in an archive but hidden ones, in its order."""
    if kind == "tar":
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictTar) as archive:
            for entry in archive:
                if entry.isfile() and not _hidden(entry.name) and (content := archive.extractfile(entry)):
                    yield entry.name, entry.size, unpack(content, entry.name)[0]
        return
    if layers:
        raise OSError("a zip archive inside a packed file; unpack it")
    with zipfile.ZipFile(path) as archive:
        for marker, what in DOCUMENTS.items():
            if marker in archive.namelist():
                raise ConfigError(f"data.source: {path} is no text but {what}; move it away")
        for info in archive.infolist():
            if not info.is_dir() and not _hidden(info.filename):
                with archive.open(info) as content:
                    yield info.filename, info.file_size, unpack(content, info.filename)[0]


def _hidden(name: str) -> bool:
    return any(part == "__MACOSX" or (part.startswith(".") and part != ".") for part in name.split("/"))


def _as_utf8(stream: io.BufferedReader, encoding: str) -> Any:
    if encoding in ("utf-16", "utf-32"):
        return _Decoded(stream, encoding)
    if encoding == "utf-8-sig":
        stream.read(len(codecs.BOM_UTF8))
    return stream


def _packing(head: bytes) -> str | None:
    if head.startswith(b"\x1f\x8b\x08"):
        return "gzip"
    if head.startswith(b"\xfd7zXZ\0"):
        return "xz"
    if head[:3] == b"BZh" and head[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):  # data, or the end at once
        return "bzip2"
    if head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):  # or a skippable frame
        return "Zstandard"
    if head[:3] == b"\x5d\0\0" and len(head) > 13 and (head[5:13] == b"\xff" * 8 or head[10:13] == b"\0" * 3):
        return "lzma"
    return None


def _is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
    except tarfile.TarError:  # no header, or a wrong checksum
        return head[257:262] == b"ustar"
    return True


def _decodes(head: bytes, encoding: str) -> bool:
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return bool(text) and not _no_text(text.encode("utf-8", "replace"))


def _no_text(head: bytes) -> str:
    """Why it is no text, or ''."""
    counts = np.bincount(np.frombuffer(head, np.uint8), minlength=256)
    if int(counts[0]) * 4 > len(head):
        return "binary (zero bytes; UTF-16 needs its byte-order mark)"
    return "binary (control characters)" if int(counts[_CONTROL].sum()) > 1 + len(head) // 100 else ""


def _are_json_lines(head: bytes) -> bool:
    """The first two lines are JSON objects."""
    lines = head.split(b"\n", 2)
    try:
        return len(lines) > 2 and all(isinstance(json.loads(line), dict) for line in lines[:2])
    except ValueError:
        return False
