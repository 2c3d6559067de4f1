"""Text as a stream of pieces: bounded memory whatever the size of a file, and a mark where a document begins.

Everything here maps a stream of pieces to a stream of pieces. Pieces end after a line break, or at least not inside
a UTF-8 character, so that a tokenizer may encode them one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple, Protocol

from transformer_vq.config import DataConfig

PIECE = 1 << 18
"""Bytes of a piece, at most; short enough that a tokenizer's threads share the work."""

SPLITS = ("train", "valid", "test")


class Piece(NamedTuple):
    """Some bytes of a document."""

    text: bytes
    begins: bool
    """A document begins with the first byte."""
    where: str
    """File or dataset row, for error messages."""
    offset: int
    """Of the first byte, in `where`."""


class Readable(Protocol):
    """What bytes are read from."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""


Pieces = Callable[[], Iterator[Piece]]
"""A split: each call reads it from the start."""

Border = Literal["byte", "character", "document"]
"""Where a stream may be cut: anywhere, between UTF-8 characters, or between documents."""


def character_start(text: bytes, at: int) -> int:
    """The first position from `at` on where no UTF-8 character is cut in two."""
    end = min(at + 3, len(text))
    while at < end and text[at] & 0xC0 == 0x80:  # a continuation byte
        at += 1
    return at


def cut(text: bytes, where: str, begins: bool = True, offset: int = 0) -> Iterator[Piece]:
    """A document in memory as pieces."""
    at = 0
    while at < len(text):
        end = at + PIECE
        if end < len(text):
            newline = text.rfind(b"\n", at + PIECE // 2, end)
            end = newline + 1 if newline >= 0 else character_start(text, end)
        yield Piece(text[at:end], begins, where, offset + at)
        at, begins = end, False


def read_stream(file: Readable, where: str) -> Iterator[Piece]:
    """A stream as one document, cut as the same bytes in memory are."""
    rest, offset = b"", 0
    while block := file.read(16 * PIECE):
        *ready, last = cut(rest + block, where, begins=offset == 0, offset=offset)
        yield from ready
        rest, offset = last.text, last.offset  # cut again, together with what follows
    yield from cut(rest, where, begins=offset == 0, offset=offset)


def split_at_separator(pieces: Iterable[Piece], separator: bytes) -> Iterator[Piece]:
    """Let a document begin after each `separator` too. The separator stays in the text, at the end of its document."""
    tail, begins = b"", True  # what could be the beginning of a separator that the next piece completes
    for piece in pieces:
        tail = b"" if piece.begins else tail
        begins = begins or piece.begins
        text, kept, at = tail + piece.text, len(tail), 0
        while (found := text.find(separator, at)) >= 0:
            end = found + len(separator)
            start = max(at, kept)
            yield Piece(text[start:end], begins, piece.where, piece.offset + start - kept)
            at, begins = end, True
        start = max(at, kept)
        if start < len(text):
            yield Piece(text[start:], begins, piece.where, piece.offset + start - kept)
            begins = False
        tail = text[max(at, len(text) - len(separator) + 1) :]


_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[0fnrt\\])")
_ESCAPED = dict(zip(b"0fnrt\\", b"\0\f\n\r\t\\", strict=True))


def separator_of(config: DataConfig) -> bytes | None:
    r"""`data.document_separator` as bytes; a backslash and a letter, as a shell or plain YAML gives them, is an escape.

    \\ is a backslash, and one before any other character stands for itself. \xNN is the byte, \uNNNN the character.
    """
    if config.document_separator is None:
        return None

    def meant(match: re.Match[bytes]) -> bytes:
        code = match[1]
        if code[:1] == b"x":
            return bytes([int(code[1:], 16)])
        return chr(int(code[1:], 16)).encode() if code[:1] == b"u" else bytes([_ESCAPED[code[0]]])

    return _ESCAPE.sub(meant, config.document_separator.encode())


def reads_pictures(config: DataConfig) -> bool:
    """The source is known to hold pictures, each a document of pixels."""
    return config.image_size is not None or config.source.endswith(".npz")


def border_of(config: DataConfig, reads_text: bool) -> Border:
    """Pictures are kept whole, and characters where the tokenizer reads text."""
    if reads_pictures(config):
        return "document"
    return "character" if reads_text else "byte"


def take(pieces: Iterable[Piece], start: int, stop: int | None, border: Border) -> Iterator[Piece]:
    """Bytes [start, stop) of a stream; a document cut by `start` goes on as a document of its own.

    border: both are moved forward to the start of a character, or of a document, which is then never cut.
    """
    if border == "document":
        yield from take_documents(pieces, start, stop)
        return
    place = character_start if border == "character" else lambda _, at: at
    at, first = 0, True
    for text, begins, where, offset in pieces:
        low = place(text, start - at) if at < start < at + len(text) else 0
        high = place(text, stop - at) if stop is not None and stop < at + len(text) else len(text)
        if at + len(text) > start and low < high:
            yield Piece(text[low:high], (begins and low == 0) or first, where, offset + low)
            first = False
        at += len(text)
        if stop is not None and at >= stop:
            return


def take_documents(pieces: Iterable[Piece], start: int, stop: int | None) -> Iterator[Piece]:
    """The documents that begin in bytes [start, stop) of a stream."""
    at, inside = 0, False
    for piece in pieces:
        if piece.begins:
            if stop is not None and at >= stop:
                return
            inside = at >= start
        if inside:
            yield piece
        at += len(piece.text)
