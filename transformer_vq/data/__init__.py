"""Bytes in, batches out: corpora, tokenizers, token files, deterministic batches.

Names are resolved on first use: only batches need torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformer_vq.data.batches import (
        Batch,
        Pass,
        document_spans,
        eval_streams,
        eval_windows,
        mixed_batch,
        stream_batch,
        window_batch,
    )
    from transformer_vq.data.cache import default_cache
    from transformer_vq.data.mixture import Mixture, check_sources, prepare_sources
    from transformer_vq.data.store import Corpus, TokenFile, check_lengths, prepare
    from transformer_vq.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "Corpus",
    "Mixture",
    "Pass",
    "TokenFile",
    "Tokenizer",
    "check_lengths",
    "check_sources",
    "default_cache",
    "document_spans",
    "eval_streams",
    "eval_windows",
    "load_tokenizer",
    "mixed_batch",
    "prepare",
    "prepare_sources",
    "stream_batch",
    "window_batch",
]

_HOME = {
    "batches": (
        "Batch",
        "Pass",
        "document_spans",
        "eval_streams",
        "eval_windows",
        "mixed_batch",
        "stream_batch",
        "window_batch",
    ),
    "cache": ("default_cache",),
    "mixture": ("Mixture", "check_sources", "prepare_sources"),
    "store": ("Corpus", "TokenFile", "check_lengths", "prepare"),
    "tokenizers": ("Tokenizer", "load_tokenizer"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
