"""tiktoken's encodings as a `tokenizer.json`: the same ids, and a run that needs no tiktoken to be loaded.

A `.tiktoken` file lists tokens in base64 with their ranks, but not the pattern that cuts text into words: that follows
from the encoding that the file is called after, or is GPT-2's. The pair of tokens that merges first is the one whose
union has the lowest rank; a `tokenizer.json` lists pairs, so every pair that makes a token is listed, by its rank.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

from transformer_vq.config import ConfigError
from transformer_vq.config.extras import need
from transformer_vq.data.tokenizers.base import byte_symbols
from transformer_vq.data.tokenizers.library import JsonTokenizer

PREFIX = "tiktoken:"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CL100K_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"""
    r"""\s+(?!\S)|\s"""
)
PATTERNS = {"gpt2": GPT2_PATTERN, "r50k_base": GPT2_PATTERN, "p50k_base": GPT2_PATTERN, "cl100k_base": CL100K_PATTERN}
"""What cuts text into words in encodings that come as files; others are named `tiktoken:NAME`, read by the package."""


def from_package(name: str) -> JsonTokenizer:
    """`tiktoken:NAME`, by the package, which fetches it once.  Raises ConfigError, one line saying what was tried."""
    where = f"{PREFIX}{name}"
    tiktoken = need("tiktoken", f"data.tokenizer = {where}")
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise ConfigError(f"data.tokenizer = {where}: must be tiktoken:NAME, NAME one of {', '.join(known)}")
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # of the network, of the file system, of a wrong hash
        why = " ".join(str(error).split())
        raise ConfigError(f"data.tokenizer = {where}: tiktoken could not fetch the encoding: {why}") from None
    return convert(encoding._mergeable_ranks, encoding._special_tokens, encoding._pat_str, where)


def from_file(path: Path) -> JsonTokenizer:
    """A `.tiktoken` file.  Raises ConfigError where a line is no token with its rank."""
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"data.tokenizer = {path}: not readable: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split() if line.strip() else (b"", b"-1")
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ConfigError(f"data.tokenizer = {path}: line {number} is not a token in base64 and its rank") from None
    ranks.pop(b"", None)  # of empty lines
    special = {"<|endoftext|>": len(ranks)} if path.stem in ("gpt2", "r50k_base") else {}
    return convert(ranks, special, PATTERNS.get(path.stem, GPT2_PATTERN), str(path))


def convert(ranks: dict[bytes, int], special: dict[str, int], pattern: str, where: str) -> JsonTokenizer:
    """The `tokenizer.json` of ranked tokens.  Raises ConfigError where single bytes are missing."""
    if any(bytes([b]) not in ranks for b in range(256)):
        raise ConfigError(f"data.tokenizer = {where}: must hold all 256 bytes as tokens")
    symbols = byte_symbols()
    written = {token: "".join(symbols[b] for b in token) for token in ranks}
    pairs = []
    for token, rank in ranks.items():
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        both = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        pairs += [(rank, ranks[left], ranks[right], written[left], written[right]) for left, right in both]
    merges = [[left, right] for _, _, _, left, right in sorted(pairs)]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, **flags} for text, i in sorted(special.items(), key=lambda x: x[1])
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # a word that is a token is that token
            "vocab": {written[token]: rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }
    return JsonTokenizer(json.dumps(content), where)
