"""What every tokenizer offers: text to ids, which bytes of the text each id stands for, and text behind ids.

Where a token's bytes lie is kept when text is encoded, and never found by decoding afterwards: a tokenizer may drop,
change or add characters, and then the decoded text is another one than the text that was read.

Axes: n tokens of all pieces in a row
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transformer_vq.config import ConfigError
from transformer_vq.data.documents import Piece
from transformer_vq.files import write_text

FILE = "tokenizer.json"


class Encoded(NamedTuple):
    """Pieces as tokens."""

    ids: NDArray[np.unsignedinteger]
    """(n,), in the smallest unsigned type."""
    lengths: NDArray[np.int64]
    """Tokens of each piece."""
    covers: NDArray[np.int64] | None
    """(n,) bytes that each token stands for, over a piece with tokens exactly the piece's; None: one byte each."""
    lost: int = 0
    """Bytes under tokens that stand for another text than theirs, and of pieces without tokens."""


class Tokenizer(ABC):
    """Text to ids and back."""

    name: str
    vocab_size: int
    reads_text: bool
    """Input must be UTF-8; else it may be any bytes."""
    unknown_id: int | None = None

    @abstractmethod
    def encode_pieces(self, pieces: Sequence[Piece]) -> Encoded:
        """Each piece as tokens.  Raises ConfigError naming file and byte where a piece cannot be read."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes behind ids; an id without a token stands for none."""

    @abstractmethod
    def to_json(self) -> str:
        """The content of `tokenizer.json`."""

    def spelled(self) -> NDArray[np.int64] | None:
        """(vocab_size,) bytes that each id spells, the same wherever it stands, control tokens none; None: not so."""
        return None

    def encode_bytes(self, text: bytes) -> NDArray[np.unsignedinteger]:
        """Ids of one text.  Raises ConfigError when it is not UTF-8 and has to be."""
        return self.encode_pieces([Piece(text, True, "text", 0)]).ids

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        ids: list[int] = self.encode_bytes(text.encode()).tolist()
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text behind ids; bytes that are not UTF-8 become the replacement character."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder: Path | str) -> None:
        """Write `tokenizer.json`, from which `load_tokenizer` restores."""
        write_text(Path(folder, FILE), self.to_json())

    @property
    def sha256(self) -> str:
        """Identity: two tokenizers with one hash do the same."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def decode_utf8(piece: Piece) -> str:
    """Text of a piece.  Raises ConfigError naming file and byte where it is not UTF-8."""
    try:
        return piece.text.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"data.tokenizer: {piece.where} is not UTF-8 at byte {piece.offset + error.start}; "
            "only data.tokenizer = bytes reads any bytes"
        ) from None


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds every id."""
    return np.min_scalar_type(vocab_size - 1)


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in a byte-level BPE  [GPT-2]."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]
