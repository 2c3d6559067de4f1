import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers

from transformer_vq.config import ConfigError
from transformer_vq.data import load_tokenizer
from transformer_vq.data.documents import Piece, cut
from transformer_vq.data.tokenizers import (
    ByteTokenizer,
    JsonTokenizer,
    make_tokenizer,
    token_dtype,
    tokenizer_identity,
    train_bpe,
)

property_test = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = (
    "Ein Text, der sich wiederholt: größer, weiter, 日本語 und 😀, größer, weiter.\n\n  def f(x):\n    return x\n" * 20
)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(300, cut(TEXT.encode(), "here"))


@property_test
@given(st.binary())
def test_bytes_hold_any_bytes(content):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode_bytes(content)
    assert ids.dtype == np.uint8
    assert ids.tolist() == list(content)
    assert tokenizer.decode_bytes(ids) == content


@property_test
@given(st.text())
def test_text_comes_back(bpe, text):
    for tokenizer in (bpe, ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_a_bpe_merges_and_has_the_size_that_was_asked_for(bpe):
    assert bpe.vocab_size == 300
    assert len(bpe.encode(TEXT)) < len(TEXT.encode()) / 2
    assert bpe.unknown_id is None


def test_half_a_character_decodes_to_its_bytes(bpe):
    ids = bpe.encode("🦜")
    assert len(ids) > 1
    assert bpe.decode_bytes(ids[:1]) == "🦜".encode()[: len(bpe.decode_bytes(ids[:1]))]
    assert "\ufffd" in bpe.decode(ids[:1])


def test_training_is_repeatable(bpe):
    assert train_bpe(300, cut(TEXT.encode(), "here")).sha256 == bpe.sha256


def test_pieces_are_encoded_one_by_one(bpe):
    pieces = [Piece(t.encode(), True, "here", 0) for t in ("größer", "", " weiter")]
    for tokenizer in (bpe, ByteTokenizer()):
        ids, lengths, *_ = tokenizer.encode_pieces(pieces)
        assert lengths.tolist() == [len(tokenizer.encode(p.text.decode())) for p in pieces]
        assert ids.tolist() == [i for p in pieces for i in tokenizer.encode(p.text.decode())]
        assert ids.dtype == token_dtype(tokenizer.vocab_size)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, np.uint8), (257, np.uint16), (65_536, np.uint16), (65_537, np.uint32)]
)
def test_ids_take_the_least_room(vocab_size, dtype):
    assert token_dtype(vocab_size) == dtype


def test_a_folder_restores_its_tokenizer(tmp_path, bpe):
    bpe.save(tmp_path)
    assert load_tokenizer(tmp_path).encode(TEXT) == bpe.encode(TEXT)
    assert load_tokenizer(tmp_path).sha256 == bpe.sha256
    ByteTokenizer().save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)


def test_bytes_are_saved_as_a_tokenizer_that_others_read(tmp_path):
    ByteTokenizer().save(tmp_path)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    text = TEXT + "".join(map(chr, range(300)))
    assert library.encode(text).ids == list(text.encode())
    assert library.decode(library.encode(text).ids) == text


def word_level():
    """Knows two words; the rest is unknown."""
    library = Library(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    library.normalizer = normalizers.Lowercase()
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    return library


def test_any_tokenizer_json_is_read(tmp_path):
    path = tmp_path / "words.json"
    word_level().save(str(path))
    tokenizer = make_tokenizer(str(path), [])
    assert (tokenizer.vocab_size, tokenizer.unknown_id) == (3, 0)
    assert tokenizer.encode("One two three") == [1, 2, 0]
    assert tokenizer.decode([1, 2]) == "one two"
    assert tokenizer.sha256 == tokenizer_identity(str(path))


def test_special_tokens_truncation_and_padding_stay_out():
    library = Library.from_str(ByteTokenizer().to_json())
    library.add_special_tokens(["<|end|>"])
    library.enable_truncation(4)
    library.enable_padding(length=16)
    tokenizer = JsonTokenizer(library.to_str())
    assert tokenizer.vocab_size == 257
    assert tokenizer.encode("hello") == list(b"hello")
    assert tokenizer.decode_bytes([104, 256]) == b"h<|end|>"


def test_a_tokenizer_without_a_byte_level_decodes_through_the_library():
    library = Library(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0)], unk_id=0))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    tokenizer = JsonTokenizer(library.to_str())
    assert tokenizer.unknown_id == 0
    assert tokenizer.decode_bytes(tokenizer.encode("ab a")) == b"ab a"


def test_tokens_outside_the_byte_alphabet_and_unused_ids_decode_as_the_library_does():
    library = Library(models.BPE({"a": 0, "▁x": 5}, []))
    library.decoder = decoders.ByteLevel()
    tokenizer = JsonTokenizer(library.to_str())
    assert tokenizer.vocab_size == 6
    assert tokenizer.decode([0, 5, 3]) == library.decode([0, 5, 3]) == "a▁x"


def test_text_that_is_not_utf8_is_named_with_its_byte(bpe):
    piece = Piece(b"fine \xff", False, "book.txt", 100)
    with pytest.raises(ConfigError, match=r"book\.txt is not UTF-8 at byte 105"):
        bpe.encode_pieces([piece])
    with pytest.raises(ConfigError, match=r"book\.txt is not UTF-8 at byte 105"):
        train_bpe(300, [piece])


@pytest.mark.parametrize("spec", ["bpe:", "bpe:256", "bpe:-5", "bpe:many", "bpe:8k", "byte", "/none/tokenizer.json"])
def test_specifications_that_mean_nothing_are_one_line(spec):
    with pytest.raises(ConfigError, match=f"data.tokenizer = {spec}") as error:
        tokenizer_identity(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", "no json", json.dumps({"model": {"type": "None"}})])
def test_a_file_that_is_no_tokenizer_is_one_line(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ConfigError, match=r"not a tokenizer\.json") as error:
        tokenizer_identity(str(tmp_path / "t.json"))
    assert "\n" not in str(error.value)


@property_test
@given(st.binary(), st.integers(1, 500))
def test_bytes_after_an_offset(tmp_path, content, offset):
    tokenizer = make_tokenizer(f"bytes+{offset}", [])
    ids = tokenizer.encode_bytes(content)
    assert ids.tolist() == [byte + offset for byte in content] and ids.dtype == token_dtype(256 + offset)
    assert tokenizer.decode_bytes([0, *ids]) == content
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.name, again.vocab_size, again.reads_text) == (f"bytes+{offset}", 256 + offset, False)
    assert tokenizer_identity(f"bytes+{offset}") == f"bytes+{offset}"
