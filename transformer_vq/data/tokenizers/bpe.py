"""A byte-level BPE trained on the train split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from transformer_vq.data.documents import Piece
from transformer_vq.data.tokenizers.base import decode_utf8
from transformer_vq.data.tokenizers.library import JsonTokenizer

BPE_SAMPLE = 200_000_000
"""Bytes at the beginning of the train split that a BPE is trained on."""


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
