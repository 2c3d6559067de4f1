"""Tokenizers: bytes, a byte-level BPE trained here, any `tokenizer.json`. One interface, one file to restore them from.

A byte tokenizer is saved as a `tokenizer.json` too: a byte-level BPE without merges whose ids are the bytes, so that
other programs can read it.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transformer_vq.config import ConfigError
from transformer_vq.data.documents import Piece
from transformer_vq.files import write_text

FILE = "tokenizer.json"
BPE_SAMPLE = 200_000_000
"""Bytes at the beginning of the train split that a BPE is trained on."""


class Tokenizer(ABC):
    """Text to ids and back."""

    name: str
    vocab_size: int
    reads_text: bool
    """Input must be UTF-8; else it may be any bytes."""
    unknown_id: int | None = None

    @abstractmethod
    def encode_pieces(self, pieces: Sequence[Piece]) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
        """ids of all pieces in a row, in the smallest unsigned type, and how many each has."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes behind ids."""

    @abstractmethod
    def to_json(self) -> str:
        """The content of `tokenizer.json`."""

    def encode_bytes(self, text: bytes) -> NDArray[np.unsignedinteger]:
        """Ids of one text.  Raises ConfigError when it is not UTF-8 and has to be."""
        return self.encode_pieces([Piece(text, True, "text", 0)])[0]

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        return self.encode_bytes(text.encode()).tolist()

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


class ByteTokenizer(Tokenizer):
    """A token is a byte, its id the byte's value after `offset` ids that stand for nothing in the text.

    The paper's implementation keeps 0, 1 and 2 for padding, end and unknown: offset 3.
    """

    reads_text = False

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset
        self.name = f"bytes+{offset}" if offset else "bytes"
        self.vocab_size = 256 + offset

    def encode_pieces(self, pieces: Sequence[Piece]) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
        ids = np.frombuffer(b"".join(piece.text for piece in pieces), np.uint8)
        if self.offset:
            ids = (ids.astype(np.uint32) + self.offset).astype(token_dtype(self.vocab_size))
        return ids, np.array([len(piece.text) for piece in pieces], np.int64)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(int(i) - self.offset for i in ids if int(i) >= self.offset)

    def to_json(self) -> str:
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        vocabulary = {f"<{i}>": i for i in range(self.offset)}
        vocabulary |= {c: i for i, c in enumerate(byte_symbols(), self.offset)}
        model = {"type": "BPE", "vocab": vocabulary, "merges": []}
        parts = {"pre_tokenizer": byte_level, "decoder": byte_level, "model": model}
        return json.dumps({"version": "1.0", "added_tokens": [], **parts}, ensure_ascii=False, indent=1)


class JsonTokenizer(Tokenizer):
    """What a `tokenizer.json` describes, run by the library `tokenizers`. Special tokens are never added."""

    reads_text = True

    def __init__(self, content: str, where: str = FILE) -> None:
        """Raises ConfigError when the library cannot read `content`."""
        import tokenizers

        try:
            self._inner = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(f"data.tokenizer = {where}: not a tokenizer.json: {error}") from None
        self._inner.no_truncation()
        self._inner.no_padding()
        settings = json.loads(content)
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.name = f"{settings['model'].get('type', 'tokenizer')} with {self.vocab_size} tokens"
        self.unknown_id = _unknown_id(settings["model"], vocabulary)
        self._bytes = _token_bytes(vocabulary) if _is_byte_level(settings["decoder"]) else None

    def encode_pieces(self, pieces: Sequence[Piece]) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
        texts = [decode_utf8(piece) for piece in pieces]
        encoded = [e.ids for e in self._inner.encode_batch_fast(texts, add_special_tokens=False)]
        flat = [np.asarray(ids, token_dtype(self.vocab_size)) for ids in encoded]
        empty = np.empty(0, token_dtype(self.vocab_size))
        return np.concatenate([empty, *flat]), np.array([len(ids) for ids in encoded], np.int64)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        if self._bytes is not None:
            return b"".join(self._bytes.get(int(i), b"") for i in ids)  # an id without a token: nothing
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=False).encode()

    def to_json(self) -> str:
        return self._inner.to_str(pretty=True)


def tokenizer_identity(spec: str) -> str:
    """What `data.tokenizer` will give, before any text is read.  Raises ConfigError when that is nothing."""
    if reads_bytes(spec):
        return spec
    if spec.startswith("bpe:"):
        size = spec.removeprefix("bpe:")
        if not size.isdecimal() or int(size) < 257:
            raise ConfigError(f"data.tokenizer = {spec}: written bpe:SIZE, SIZE at least 257 (256 bytes and one merge)")
        import tokenizers

        return f"{spec} trained by tokenizers {tokenizers.__version__}"
    return JsonTokenizer(_read(spec), spec).sha256


def reads_bytes(spec: str) -> bool:
    """True for `bytes` and `bytes+OFFSET`, whose input may be any bytes."""
    return spec == "bytes" or (spec.startswith("bytes+") and spec.removeprefix("bytes+").isdecimal())


def make_tokenizer(spec: str, train: Iterable[Piece]) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names; a BPE is trained on `train`."""
    if reads_bytes(spec):
        return ByteTokenizer(int(spec.partition("+")[2] or 0))
    if spec.startswith("bpe:"):
        return train_bpe(int(spec.removeprefix("bpe:")), train)
    return _from_json(_read(spec), spec)


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Restore what `save` wrote.  Raises ConfigError when the folder holds no tokenizer."""
    return _from_json(_read(str(Path(folder, FILE))), str(folder))


def train_bpe(size: int, pieces: Iterable[Piece]) -> JsonTokenizer:
    """A byte-level BPE of at most `size` tokens, fewer when no pairs are left to merge. No token is unknown to it."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )

    def sample() -> Iterator[str]:
        left = BPE_SAMPLE
        for piece in pieces:
            if left <= 0:
                return
            left -= len(piece.text)
            yield decode_utf8(piece)

    inner.train_from_iterator(sample(), trainer)
    return JsonTokenizer(inner.to_str())


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


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.tokenizer = {path}: not readable as a tokenizer.json ({error}); "
            "bytes | bytes+3 | bpe:SIZE | a tokenizer.json"
        ) from None


def _from_json(content: str, where: str) -> Tokenizer:
    loaded = JsonTokenizer(content, where)
    bytewise = ByteTokenizer(loaded.vocab_size - 256) if 256 <= loaded.vocab_size < 1256 else ByteTokenizer()
    return bytewise if loaded.sha256 == JsonTokenizer(bytewise.to_json()).sha256 else loaded


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    return decoder is not None and decoder["type"] == "ByteLevel"


def _token_bytes(vocabulary: dict[str, int]) -> dict[int, bytes]:
    """Bytes of every token of a byte-level vocabulary; one that is not written in byte symbols is spelled out."""
    byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    return {
        i: bytes(byte_of[c] for c in token) if all(c in byte_of for c in token) else token.encode()
        for token, i in vocabulary.items()
    }


def _unknown_id(model: dict[str, Any], vocabulary: dict[str, int]) -> int | None:
    if model.get("unk_id") is not None:  # Unigram
        return int(model["unk_id"])
    return vocabulary.get(model.get("unk_token") or "")
