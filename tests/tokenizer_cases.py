"""Small tokenizers of every kind that the library has, and what is lost under their tokens, counted by hand."""

from __future__ import annotations

from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers


def characters() -> Library:
    """Knows a few characters one by one, and has no decoder: the row of CASES."""
    return Library(models.BPE({c: i for i, c in enumerate("abcz .ä\n")}, [], unk_token=None))


def words() -> Library:
    library = Library(models.WordLevel({"[UNK]": 0, "ab": 1, "c": 2, ".": 3}, unk_token="[UNK]"))
    library.normalizer, library.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    return library


def word_pieces() -> Library:
    vocabulary = {t: i for i, t in enumerate(["[UNK]", "a", "##b", "##a", "b", "c", "##c", "a", "."])}
    library = Library(models.WordPiece(vocabulary, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(strip_accents=True)
    library.pre_tokenizer, library.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return library


def unigram(fallback: bool) -> Library:
    single = [(f"<0x{b:02X}>", -20.0) for b in range(256)] if fallback else []
    pieces = [("<unk>", 0.0), *single, ("▁", -3.0), ("▁a", -1.0), ("b", -2.0), ("ab", -1.5), ("c", -2.0), ("z", -2.0)]
    library = Library(models.Unigram(pieces, unk_id=0, byte_fallback=fallback))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = [decoders.ByteFallback(), decoders.Metaspace()] if fallback else [decoders.Metaspace()]
    library.decoder = decoders.Sequence(parts)
    return library


def llama() -> Library:
    vocabulary = {f"<0x{b:02X}>": b for b in range(256)} | {"▁": 256, "a": 257, "b": 258, "▁a": 259, "z": 260}
    library = Library(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(parts)
    return library


def byte_level(lowercase: bool = False, prefix: bool = False, decoder: bool = True) -> Library:
    library = Library(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    library.decoder = decoders.ByteLevel() if decoder else None
    library.normalizer = normalizers.Lowercase() if lowercase else None
    library.add_tokens(["Bác", "ab"])
    library.add_special_tokens(["<|end|>"])
    return library


LIBRARIES = {
    "characters": characters, "words": words, "word pieces": word_pieces, "llama": llama,
    "unigram": lambda: unigram(False), "unigram with bytes": lambda: unigram(True), "byte level": byte_level,
    "byte level, lower case": lambda: byte_level(lowercase=True), "byte level, space": lambda: byte_level(prefix=True),
    "byte level, no decoder": lambda: byte_level(decoder=False),
}  # fmt: skip
LOSSLESS = ("llama", "byte level", "byte level, no decoder")


def brute_force(tokenizer, text: bytes, ids: list[int], covers: list[int]) -> int:
    """Bytes under tokens that do not stand for them, each looked at behind the one before it."""
    if tokenizer.decode_bytes(ids) == text:
        return 0
    at, lost = 0, 0
    for n, (i, size) in enumerate(zip(ids, covers, strict=True)):
        before = ids[n - 1 : n] if n else []
        whole, start = tokenizer.decode_bytes([*before, i]), tokenizer.decode_bytes(before)
        mine = whole[len(start) :] if whole.startswith(start) else tokenizer.decode_bytes([i])
        lost += size if mine != text[at : at + size] else 0
        at += size
    return lost or len(text)
