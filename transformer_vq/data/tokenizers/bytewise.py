"""A token is a byte. Saved as a `tokenizer.json` too, a byte-level BPE without merges, for other programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from transformer_vq.data.documents import Piece
from transformer_vq.data.tokenizers.base import Encoded, Tokenizer, byte_symbols, token_dtype


class ByteTokenizer(Tokenizer):
    """A token is a byte, its id the byte's value after `offset` ids that stand for nothing in the text.

    The paper's implementation keeps 0, 1 and 2 for padding, end and unknown: offset 3.
    """

    reads_text = False

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset
        self.name = f"bytes+{offset}" if offset else "bytes"
        self.vocab_size = 256 + offset

    def encode_pieces(self, pieces: Sequence[Piece]) -> Encoded:
        ids = np.frombuffer(b"".join(piece.text for piece in pieces), np.uint8)
        if self.offset:
            ids = (ids.astype(np.uint32) + self.offset).astype(token_dtype(self.vocab_size))
        return Encoded(ids, np.array([len(piece.text) for piece in pieces], np.int64), None)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(int(i) - self.offset for i in ids if self.offset <= int(i) < self.vocab_size)

    def spelled(self) -> NDArray[np.int64]:
        return (np.arange(self.vocab_size) >= self.offset).astype(np.int64)

    def to_json(self) -> str:
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        vocabulary = {f"<{i}>": i for i in range(self.offset)}
        vocabulary |= {c: i for i, c in enumerate(byte_symbols(), self.offset)}
        model = {"type": "BPE", "vocab": vocabulary, "merges": []}
        parts = {"pre_tokenizer": byte_level, "decoder": byte_level, "model": model}
        return json.dumps({"version": "1.0", "added_tokens": [], **parts}, ensure_ascii=False, indent=1)
