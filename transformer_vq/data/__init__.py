"""Bytes in, batches out: corpora, tokenizers, token files, deterministic batches."""

from transformer_vq.data.batches import Batch, eval_streams, eval_windows, stream_batch, window_batch
from transformer_vq.data.store import Corpus, TokenFile, check_lengths, default_cache, prepare
from transformer_vq.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "Corpus",
    "TokenFile",
    "Tokenizer",
    "check_lengths",
    "default_cache",
    "eval_streams",
    "eval_windows",
    "load_tokenizer",
    "prepare",
    "stream_batch",
    "window_batch",
]
