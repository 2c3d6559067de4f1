"""What a `tokenizer.json` describes, run by the library `tokenizers`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transformer_vq.config import ConfigError
from transformer_vq.data.documents import Piece
from transformer_vq.data.tokenizers.base import FILE, Encoded, byte_symbols, decode_utf8, token_dtype
from transformer_vq.data.tokenizers.context import LibraryTokenizer
from transformer_vq.data.tokenizers.spans import covered_bytes

_DROPS = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit"}
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class JsonTokenizer(LibraryTokenizer):
    """A tokenizer of the library. Special tokens are never added, nothing is padded, cut short or left to chance."""

    def __init__(self, content: str, where: str = FILE) -> None:
        """Raises ConfigError when the library cannot read `content`, or finds no token in it."""
        import tokenizers

        super().__init__()
        try:
            self._inner = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(f"data.tokenizer = {where}: not a tokenizer.json: {error}") from None
        self._inner.no_truncation()
        self._inner.no_padding()
        if getattr(self._inner.model, "dropout", None):
            self._inner.model.dropout = None  # of a BPE, which alone has it
        settings = json.loads(self._inner.to_str())  # as the library understood it: every key is there
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ConfigError(f"data.tokenizer = {where}: not a tokenizer.json: its vocabulary is empty")
        self.vocab_size = max(vocabulary.values()) + 1
        self.name = f"{settings['model'].get('type', 'tokenizer')} with {self.vocab_size} tokens"
        self.unknown_id = _unknown_id(settings["model"], vocabulary)
        self._special = {token["id"] for token in settings["added_tokens"] if token["special"]}
        self._table = _table(settings, vocabulary)
        self._bytes = {} if self._table is not None else _byte_tokens(settings, vocabulary)

    def encode_pieces(self, pieces: Sequence[Piece]) -> Encoded:
        texts = [decode_utf8(piece) for piece in pieces]
        parts = None if self._table is None else self._encode_by_table(pieces, texts)
        parts = parts or self._encode_by_offsets(pieces, texts)
        ids = np.concatenate([np.empty(0, token_dtype(self.vocab_size)), *(part[0] for part in parts)])
        covers = np.concatenate([np.empty(0, np.int64), *(part[1] for part in parts)])
        lengths = np.array([len(part[0]) for part in parts], np.int64)
        return Encoded(ids, lengths, covers, sum(part[2] for part in parts))

    def to_json(self) -> str:
        return self._inner.to_str(pretty=True)

    def spelled(self) -> NDArray[np.int64] | None:
        if self._table is None:
            return None
        texts = (b"" if i in self._special else self._table.get(i, b"") for i in range(self.vocab_size))
        return np.fromiter(map(len, texts), np.int64, self.vocab_size)

    def _encode_by_table(self, pieces: Sequence[Piece], texts: list[str]) -> list[_Part] | None:
        """The quick way; None where a piece does not come back, and tokens must be asked where they lie."""
        assert self._table is not None
        parts: list[_Part] = []
        for piece, encoded in zip(pieces, self._run(pieces, texts, offsets=False), strict=True):
            tokens = [self._table.get(i, b"") for i in encoded.ids]
            if b"".join(tokens) != piece.text:
                return None
            parts.append((self._array(encoded.ids), np.fromiter(map(len, tokens), np.int64, len(tokens)), 0))
        return parts

    def _encode_by_offsets(self, pieces: Sequence[Piece], texts: list[str]) -> list[_Part]:
        parts: list[_Part] = []
        for piece, encoded in zip(pieces, self._run(pieces, texts, offsets=True), strict=True):
            covers = covered_bytes(piece.text, encoded.offsets)
            parts.append((self._array(encoded.ids), covers, self._lost(piece.text, encoded.ids, covers)))
        return parts

    def _run(self, pieces: Sequence[Piece], texts: list[str], offsets: bool) -> list[Any]:
        encode = self._inner.encode_batch if offsets else self._inner.encode_batch_fast
        try:
            return encode(texts, add_special_tokens=False)
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(f"data.tokenizer: {self.name} cannot read {pieces[0].where}: {error}") from None

    def _array(self, ids: list[int]) -> NDArray[np.unsignedinteger]:
        return np.asarray(ids, token_dtype(self.vocab_size))

    def _decode(self, ids: list[int]) -> str:
        return self._inner.decode(ids, skip_special_tokens=False)


_Part = tuple[NDArray[np.unsignedinteger], NDArray[np.int64], int]  # of a piece: ids, bytes of each, bytes lost


def _parts(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder as the list of what it does."""
    if part is None:
        return []
    nested = next((part[key] for key in ("pretokenizers", "normalizers", "decoders") if key in part), None)
    return [part] if nested is None else [one for inner in nested for one in _parts(inner)]


def _table(settings: dict[str, Any], vocabulary: dict[str, int]) -> dict[int, bytes] | None:
    """Bytes of every token, where they are the same wherever it stands; else None."""
    model = settings["model"]
    decoders = [part["type"] for part in _parts(settings["decoder"])]
    before = [*_parts(settings["normalizer"]), *_parts(settings["pre_tokenizer"])]
    added = {token["content"] for token in settings["added_tokens"]}
    if set(decoders) - {"Fuse"} == {"ByteLevel"} or (
        not decoders and any(part["type"] == "ByteLevel" for part in before)
    ):
        byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        return {
            i: bytes(byte_of[c] for c in token)
            if token not in added and byte_of.keys() >= set(token)
            else token.encode()
            for token, i in vocabulary.items()
        }
    drops = any(part["type"] in _DROPS or part.get("behavior") == "Removed" for part in before)
    marks = [model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")]
    spaces = any(part["type"] == "Metaspace" for part in before)
    if set(decoders) - {"Fuse"} or (not decoders and (drops or spaces or any(marks))):
        return None
    single = _byte_tokens(settings, vocabulary)
    return {i: bytes([single[i]]) if i in single else token.encode() for token, i in vocabulary.items()}


def _byte_tokens(settings: dict[str, Any], vocabulary: dict[str, int]) -> dict[int, int]:
    """The bytes of `<0xE4>` and its like, where the vocabulary falls back to them."""
    falls_back = any(part["type"] == "ByteFallback" for part in _parts(settings["decoder"]))
    if not falls_back and not settings["model"].get("byte_fallback"):
        return {}
    added = {token["content"] for token in settings["added_tokens"]}
    named = ((i, _BYTE.fullmatch(token)) for token, i in vocabulary.items() if token not in added)
    return {i: int(match[1], 16) for i, match in named if match}


def _unknown_id(model: dict[str, Any], vocabulary: dict[str, int]) -> int | None:
    if model.get("unk_id") is not None:  # Unigram
        return int(model["unk_id"])
    return vocabulary.get(model.get("unk_token") or "")
