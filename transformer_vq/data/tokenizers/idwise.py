"""Ids whose text is not known: of a vocabulary one has the size of, `data.tokenizer: tokens:50257`.

As text an id is written as a number, ids apart by white space: so prompts are read and continuations are shown. Such
text has no bytes to speak of, and nothing is ever said per byte of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np

from transformer_vq.config import ConfigError
from transformer_vq.data.documents import Piece
from transformer_vq.data.tokenizers.base import Encoded, Tokenizer, token_dtype


class IdTokenizer(Tokenizer):
    """A token is its id. Saved as a `tokenizer.json` of words that are numbers."""

    reads_text = True

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.name = f"tokens:{vocab_size}"

    def encode_pieces(self, pieces: Sequence[Piece]) -> Encoded:
        words = [piece.text.split() for piece in pieces]
        for piece, row in zip(pieces, words, strict=True):
            for word in row:
                if not word.isdigit() or int(word) >= self.vocab_size:
                    raise ConfigError(
                        f"data.tokenizer = {self.name}: {piece.where} holds {word.decode(errors='replace')!r}; the "
                        f"text behind these tokens is not known, so they are written as ids from 0 to "
                        f"{self.vocab_size - 1}, like 5 17 3"
                    )
        ids = np.array([int(word) for row in words for word in row], token_dtype(self.vocab_size))
        return Encoded(ids, np.array([len(row) for row in words], np.int64), None)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return " ".join(str(int(i)) for i in ids).encode()

    def to_json(self) -> str:
        model = {"type": "WordLevel", "vocab": {str(i): i for i in range(self.vocab_size)}, "unk_token": ""}
        parts = {"pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": None, "model": model}
        return json.dumps({"version": "1.0", "added_tokens": [], **parts})
