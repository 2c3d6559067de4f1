"""Tokenizers: bytes, a byte-level BPE trained here, files and hub names of others. One interface, one file to restore
them from, which lies in every run folder.

    bytes | bytes+3                       bytewise.py     bpe:SIZE                         bpe.py
    a tokenizer.json, a folder or run     library.py      a .model file                    sentencepiece.py
    tiktoken:NAME, a .tiktoken file       tiktoken.py     hf:NAME[@REVISION], or NAME      hub.py
    tokens:SIZE, ids without text         idwise.py
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path

from transformer_vq.config import ConfigError
from transformer_vq.data.documents import Piece
from transformer_vq.data.tokenizers import hub, sentencepiece, tiktoken
from transformer_vq.data.tokenizers.base import FILE, Encoded, Tokenizer, decode_utf8, token_dtype
from transformer_vq.data.tokenizers.bpe import train_bpe
from transformer_vq.data.tokenizers.bytewise import ByteTokenizer
from transformer_vq.data.tokenizers.idwise import IdTokenizer
from transformer_vq.data.tokenizers.library import JsonTokenizer

__all__ = [
    "FILE",
    "ByteTokenizer",
    "Encoded",
    "IdTokenizer",
    "JsonTokenizer",
    "Tokenizer",
    "decode_utf8",
    "load_tokenizer",
    "make_tokenizer",
    "parse_tokenizer",
    "reads_bytes",
    "token_dtype",
    "tokenizer_identity",
    "train_bpe",
]

FORMS = (
    "bytes | bytes+3 | bpe:SIZE | a tokenizer.json, or a folder or run with one | hf:NAME[@REVISION] | "
    "tiktoken:NAME or a .tiktoken file | a SentencePiece .model file | tokens:SIZE for ids without text"
)
LARGEST = 2**32
IDS = "tokens:"


def tokenizer_identity(spec: str) -> str:
    """What `data.tokenizer` will give, before any text is read.  Raises ConfigError when that is nothing."""
    if spec.startswith("bpe:"):
        import tokenizers

        return f"bpe:{_bpe_size(spec)} trained by tokenizers {tokenizers.__version__}"
    tokenizer = _existing(spec)
    return tokenizer.name if isinstance(tokenizer, ByteTokenizer | IdTokenizer) else tokenizer.sha256


def reads_bytes(spec: str) -> bool:
    """True for `bytes` and `bytes+OFFSET`, whose input may be any bytes; also of a tokenizer's identity."""
    return spec == "bytes" or (spec.startswith("bytes+") and spec.removeprefix("bytes+").isdecimal())


def is_here(spec: str) -> bool:
    """Whether it can be made without the network."""
    made = reads_bytes(spec) or spec.startswith(("bpe:", IDS))
    return made or Path(spec).expanduser().exists()


def make_tokenizer(spec: str, train: Iterable[Piece]) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names; a BPE is trained on `train`.  Raises ConfigError when it is none."""
    return train_bpe(_bpe_size(spec), train) if spec.startswith("bpe:") else _existing(spec)


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Restore what `save` wrote.  Raises ConfigError when the folder holds no tokenizer."""
    return parse_tokenizer(_read(Path(folder, FILE), str(folder)), str(folder))


def _existing(spec: str) -> Tokenizer:
    """A tokenizer that needs no text to be made."""
    if reads_bytes(spec):
        return ByteTokenizer(int(spec.partition("+")[2] or 0))
    if spec.startswith(IDS):
        size = spec.removeprefix(IDS)
        if not size.isdecimal() or not 0 < int(size) <= LARGEST:
            raise ConfigError(f"data.tokenizer = {spec}: written tokens:SIZE, SIZE the vocabulary's, at least 1")
        return IdTokenizer(int(size))
    if spec.startswith(tiktoken.PREFIX):
        return tiktoken.from_package(spec.removeprefix(tiktoken.PREFIX))
    path = Path(spec).expanduser()
    if spec.startswith(hub.PREFIX) or not path.exists():
        path = _on_hub(spec)
    if path.is_dir():
        found = [path / name for name in hub.FILES if (path / name).is_file()]
        if not found:
            raise ConfigError(f"data.tokenizer = {spec}: the folder holds no {' and no '.join(hub.FILES)}")
        path = found[0]
    if path.suffix == ".tiktoken":
        return tiktoken.from_file(path)
    if path.suffix == ".model":
        return sentencepiece.SentencePieceTokenizer(_read_bytes(path, spec), spec)
    return parse_tokenizer(_read(path, spec), spec)


def _on_hub(spec: str) -> Path:
    """Raises ConfigError, without asking the hub where the text is no name there, or next to one of our words."""
    if not spec.startswith(hub.PREFIX):
        near = difflib.get_close_matches(spec, ["bytes", "bytes+3", "bpe:8192"], n=1, cutoff=0.75)
        if near or not hub.is_name(spec):
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"data.tokenizer = {spec}: no such file or folder ({FORMS}){hint}")
    return hub.find(spec)


def _bpe_size(spec: str) -> int:
    size = spec.removeprefix("bpe:")
    if not size.isdecimal() or int(size) < 257:
        raise ConfigError(f"data.tokenizer = {spec}: written bpe:SIZE, SIZE at least 257 (256 bytes and one merge)")
    return int(size)


def _read(path: Path, where: str) -> str:
    try:
        return _read_bytes(path, where).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"data.tokenizer = {where}: not readable as a tokenizer.json ({error}); {FORMS}") from None


def _read_bytes(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"data.tokenizer = {where}: not readable ({error}); {FORMS}") from None


def parse_tokenizer(content: str, where: str) -> Tokenizer:
    """What a `tokenizer.json` describes.  Raises ConfigError, naming `where`, when it is none."""
    if sentencepiece.is_sentencepiece(content):
        return sentencepiece.from_json(content, where)
    if (ids := _as_ids(content)) is not None:
        return ids
    loaded = JsonTokenizer(content, where)
    bytewise = ByteTokenizer(loaded.vocab_size - 256) if 256 <= loaded.vocab_size < 1256 else ByteTokenizer()
    return bytewise if loaded.sha256 == JsonTokenizer(bytewise.to_json()).sha256 else loaded


def _as_ids(content: str) -> IdTokenizer | None:
    """The tokenizer of ids without text that wrote this, if one did."""
    if '"WhitespaceSplit"' not in content[:200]:
        return None
    try:
        size = len(json.loads(content)["model"]["vocab"])
    except (ValueError, KeyError, TypeError):
        return None
    tokenizer = IdTokenizer(size)
    return tokenizer if size and tokenizer.to_json() == content else None
