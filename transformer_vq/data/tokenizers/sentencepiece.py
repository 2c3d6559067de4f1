"""SentencePiece `.model` files, run by their own library; a run keeps the whole file inside its `tokenizer.json`."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from transformer_vq.config import ConfigError
from transformer_vq.config.extras import need
from transformer_vq.data.documents import Piece
from transformer_vq.data.tokenizers.base import Encoded, decode_utf8, token_dtype
from transformer_vq.data.tokenizers.context import LibraryTokenizer
from transformer_vq.data.tokenizers.spans import share_out

KEY = "sentencepiece"


class SentencePieceTokenizer(LibraryTokenizer):
    """Text to ids as SentencePiece does it. Begin and end of a sentence are never added."""

    _table = None

    def __init__(self, model: bytes, where: str) -> None:
        """model: the content of a `.model` file.  Raises ConfigError without the package, or for another file."""
        super().__init__()
        package = need("sentencepiece", f"data.tokenizer = {where}")
        self._model, self._inner = model, package.SentencePieceProcessor()
        try:
            self._inner.LoadFromSerializedProto(model)
        except (RuntimeError, ValueError, TypeError) as error:
            why = " ".join(str(error).split())
            raise ConfigError(f"data.tokenizer = {where}: not a SentencePiece model: {why}") from None
        self.vocab_size = self._inner.vocab_size()
        self.name = f"SentencePiece with {self.vocab_size} tokens"
        self.unknown_id = self._inner.unk_id()
        ids = range(self.vocab_size)
        self._bytes = {i: int(self._inner.id_to_piece(i)[3:5], 16) for i in ids if self._inner.is_byte(i)}

    def encode_pieces(self, pieces: Sequence[Piece]) -> Encoded:
        rows, covers, lost = [], [], 0
        for piece in pieces:
            found = self._inner.encode(decode_utf8(piece), return_type="proto").pieces
            row = [token.id for token in found]
            rows.append(row)
            covers.append(self._covers(piece.text, row, [(token.begin, token.end) for token in found]))
            lost += self._lost(piece.text, row, covers[-1])
        ids = np.array([i for row in rows for i in row], token_dtype(self.vocab_size))
        flat = np.concatenate([np.empty(0, np.int64), *covers])
        return Encoded(ids, np.array([len(row) for row in rows], np.int64), flat, lost)

    def to_json(self) -> str:
        return json.dumps({"version": "1.0", KEY: base64.b64encode(self._model).decode()})

    def _covers(self, text: bytes, ids: list[int], spans: list[tuple[int, int]]) -> NDArray[np.int64]:
        """The library gives the bytes of a character that it has no piece for to the last of its byte tokens."""
        if not ids:
            return np.empty(0, np.int64)
        joined = np.array(spans, np.int64)
        single = np.array([i in self._bytes for i in ids])
        borders = np.flatnonzero(np.diff(single, prepend=False, append=False))
        for first, stop in borders.reshape(-1, 2):
            joined[first:stop] = joined[first, 0], joined[stop - 1, 1]
        return share_out(joined, len(text))

    def _decode(self, ids: list[int]) -> str:
        return str(self._inner.decode(ids))


def is_sentencepiece(content: str) -> bool:
    """A `tokenizer.json` of ours that wraps a SentencePiece model."""
    return content.startswith('{"version": "1.0", "' + KEY)


def from_json(content: str, where: str) -> SentencePieceTokenizer:
    """What `to_json` wrote."""
    return SentencePieceTokenizer(base64.b64decode(json.loads(content)[KEY]), where)
