"""Which bytes of the text lie under each token: kept when text is read, whatever decoding makes of the tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers

from transformer_vq.config import DataConfig
from transformer_vq.data import prepare
from transformer_vq.data.documents import Piece
from transformer_vq.data.tokenizers import JsonTokenizer
from transformer_vq.data.tokenizers.spans import covered_bytes, slices

ALPHABET = "abBcz ä日😀\n.\t"
property_test = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


@pytest.fixture(scope="module")
def tokenizers():
    return {name: JsonTokenizer(make().to_str()) for name, make in LIBRARIES.items()}


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


@pytest.mark.parametrize("name", LIBRARIES)
@property_test
@given(texts=st.lists(st.text(ALPHABET, max_size=12), min_size=1, max_size=3))
def test_bytes_under_tokens_add_up_and_what_is_lost_is_counted(tokenizers, name, texts):
    tokenizer = tokenizers[name]
    pieces = [Piece(text.encode(), True, "here", 0) for text in texts]
    encoded = tokenizer.encode_pieces(pieces)
    assert len(encoded.covers) == len(encoded.ids) == encoded.lengths.sum() and (encoded.covers >= 0).all()
    at, lost = 0, 0
    for piece, length in zip(pieces, encoded.lengths, strict=True):
        ids, covers = encoded.ids[at : at + length].tolist(), encoded.covers[at : at + length].tolist()
        assert sum(covers) == (len(piece.text) if length else 0)
        lost += brute_force(tokenizer, piece.text, ids, covers)
        at += length
        if name in LOSSLESS:
            assert tokenizer.decode_bytes(ids) == piece.text
    assert encoded.lost == lost
    assert lost == 0 or name not in LOSSLESS


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_corpus_keeps_them_and_says_what_is_lost(tmp_path, name):
    text = "ab c. Bác ab  😀 z\n" * 60
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    LIBRARIES[name]().save(str(tmp_path / "t.json"))
    corpus = prepare(
        DataConfig(source=str(tmp_path / "text.txt"), cache=str(tmp_path / "c"), tokenizer=str(tmp_path / "t.json"))
    )
    total, lost = len(text.encode()), 0
    at = 0
    for file in corpus.splits.values():
        part = text.encode()[at : at + file.bytes]
        at += file.bytes
        covers = file.covered(0, len(file))
        assert covers.sum() == file.bytes
        lost += brute_force(corpus.tokenizer, part, file.tokens.tolist(), covers.tolist())
        for count in (1, 2, 7, len(file) - 1):
            head = file.head(count)
            assert head.bytes == covers[:count].sum()
            assert head.words == len(part[: head.bytes].split())
    assert at == total
    notes = [note for note in corpus.notes if "does not come back" in note]
    assert len(notes) == (lost > 0) and (not notes or f"{lost:,} of {total:,} bytes" in notes[0])


def test_gaps_belong_to_what_follows_and_shared_characters_are_shared():
    text = "  Grüße 日 x ".encode()
    covers = covered_bytes(text, [(2, 5), (5, 7), (8, 9), (8, 9), (8, 9), (10, 11)])
    assert slices(text, covers) == [b"  Gr\xc3\xbc", "ße".encode(), b" \xe6", b"\x97", b"\xa5", b" x "]


@property_test
@given(st.text(ALPHABET), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1))
def test_any_offsets_give_shares_of_the_text(text, offsets):
    covers = covered_bytes(text.encode(), offsets)
    assert covers.sum() == len(text.encode()) and (covers >= 0).all() and len(covers) == len(offsets)


def test_pieces_without_tokens_fall_to_the_next_token_and_the_last(tmp_path):
    """Zero bytes, each a document of its own without a token, at the beginning, inside and at the end."""
    library = words()
    library.normalizer = normalizers.Replace("\0", "")
    library.save(str(tmp_path / "t.json"))
    for name, text in {"train": "\0\0ab\0\0c\0\0", "valid": "\0ab c", "test": "ab c\0\0\0"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    config = DataConfig(
        source=str(tmp_path), cache=str(tmp_path / ".c"), tokenizer=str(tmp_path / "t.json"), document_separator="\0"
    )
    splits = prepare(config).splits
    found = {name: file.covered(0, len(file)).tolist() for name, file in splits.items()}
    assert found == {"train": [5, 4], "valid": [3, 2], "test": [2, 5]}
    assert [file.head(1).words for file in splits.values()] == [3, 2, 1]  # a zero byte is a word too


def test_more_bytes_than_fit_into_one(tmp_path):
    text = "x" * 70_000 + " ab " * 40
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(text)
    words().save(str(tmp_path / "t.json"))
    config = DataConfig(source=str(tmp_path), cache=str(tmp_path / ".c"), tokenizer=str(tmp_path / "t.json"))
    file = prepare(config).splits["valid"]
    assert file.covers.dtype == np.uint32 and file.begins.dtype == np.uint8
    assert file.covered(0, 2).tolist() == [70_000, 3] and file.bytes == len(text) == file.covers.sum()
