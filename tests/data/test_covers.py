"""Which bytes of the text lie under each token: kept when text is read, whatever decoding makes of the tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_cases import LIBRARIES, LOSSLESS, brute_force, words
from tokenizers import normalizers

from transformer_vq.config import DataConfig
from transformer_vq.data import prepare
from transformer_vq.data.documents import Piece
from transformer_vq.data.tokenizers import JsonTokenizer
from transformer_vq.data.tokenizers.spans import covered_bytes, slices

ALPHABET = "abBcz ä日😀\n.\t"
property_test = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizers():
    return {name: JsonTokenizer(make().to_str()) for name, make in LIBRARIES.items()}


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
    """Bars, each a document of its own without a token, at the beginning, inside and at the end."""
    library = words()
    library.normalizer = normalizers.Replace("|", "")
    library.save(str(tmp_path / ".t.json"))
    for name, text in {"train": "||ab||c||", "valid": "|ab c", "test": "ab c|||"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    config = DataConfig(
        source=str(tmp_path), cache=str(tmp_path / ".c"), tokenizer=str(tmp_path / ".t.json"), document_separator="|"
    )
    splits = prepare(config).splits
    found = {name: file.covered(0, len(file)).tolist() for name, file in splits.items()}
    assert found == {"train": [5, 4], "valid": [3, 2], "test": [2, 5]}
    assert [file.head(1).words for file in splits.values()] == [3, 2, 1]  # a bar is a word too


def test_more_bytes_than_fit_into_one(tmp_path):
    text = "x" * 70_000 + " ab " * 40
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(text)
    words().save(str(tmp_path / ".t.json"))
    config = DataConfig(source=str(tmp_path), cache=str(tmp_path / ".c"), tokenizer=str(tmp_path / ".t.json"))
    file = prepare(config).splits["valid"]
    assert file.covers.dtype == np.uint32 and file.begins.dtype == np.uint8
    assert file.covered(0, 2).tolist() == [70_000, 3] and file.bytes == len(text) == file.covers.sum()
