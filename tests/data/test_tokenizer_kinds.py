"""Tokenizers from elsewhere: what other libraries make of the same text is what we make of it."""

from __future__ import annotations

import base64
import io
import json

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import LIBRARIES, LOSSLESS, brute_force, byte_level, llama
from tokenizers import Tokenizer as Library
from tokenizers import models, processors

from transformer_vq.config import ConfigError
from transformer_vq.data import load_tokenizer
from transformer_vq.data.documents import Piece, cut
from transformer_vq.data.tokenizers import ByteTokenizer, JsonTokenizer, make_tokenizer, tokenizer_identity, train_bpe
from transformer_vq.data.tokenizers.tiktoken import GPT2_PATTERN

TEXT = "Ein Text, der größer wird: größer  und größer.\n\n日本語 und 😀, it's 12345 things\n" * 20
property_test = settings(deadline=None, max_examples=40)


def test_added_tokens_are_their_own_text():
    tokenizer = JsonTokenizer(byte_level().to_str())
    for text in ("Bác", "<|end|>", "xBác<|end|> ab"):
        assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


def test_half_a_character_of_a_byte_fallback_stays_bytes():
    tokenizer = JsonTokenizer(llama().to_str())
    ids = tokenizer.encode("a ä")
    assert tokenizer.decode_bytes(ids[:-1]) == b"a \xc3" and tokenizer.decode_bytes(ids) == "a ä".encode()
    assert tokenizer.decode_bytes([0xE4]) == b"\xe4" and tokenizer.decode_bytes([259, 0xE4, 259]) == b"a\xe4 a"


@pytest.mark.parametrize("name", LIBRARIES)
def test_settings_that_a_file_may_have_change_nothing(name, tmp_path):
    library = LIBRARIES[name]()
    plain = JsonTokenizer(library.to_str())
    library.enable_truncation(3)
    library.enable_padding(length=50)
    library.add_special_tokens(["[CLS]"])
    library.post_processor = processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", plain.vocab_size)])
    content = {key: value for key, value in json.loads(library.to_str()).items() if value is not None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    loaded = make_tokenizer(str(tmp_path), [])
    assert loaded.encode("ab c. Bác z") == plain.encode("ab c. Bác z")
    loaded.save(tmp_path)
    assert load_tokenizer(tmp_path).sha256 == loaded.sha256 == tokenizer_identity(str(tmp_path))
    if name in LOSSLESS:
        assert loaded.decode(b"ab c" and loaded.encode("ab c")) == "ab c"


def test_a_tokenizer_without_an_unknown_token_and_an_empty_one_are_one_line():
    tokenizer = JsonTokenizer(Library(models.WordLevel({"a": 0}, unk_token="none")).to_str())
    with pytest.raises(ConfigError, match="cannot read text"):
        tokenizer.encode("b")
    with pytest.raises(ConfigError, match="vocabulary is empty"):
        JsonTokenizer(Library(models.BPE()).to_str())


def test_merges_are_not_left_to_chance():
    library = Library(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], dropout=0.5))
    tokenizer = JsonTokenizer(library.to_str())
    assert tokenizer.encode("ab" * 50) == [2] * 50


def test_a_run_of_bytes_named_by_its_folder_still_reads_any_bytes(tmp_path):
    ByteTokenizer(3).save(tmp_path)
    assert tokenizer_identity(str(tmp_path)) == "bytes+3"
    assert make_tokenizer(str(tmp_path), []).encode_bytes(b"\xff").tolist() == [258]


@pytest.fixture(scope="module")
def ranks():
    """A vocabulary as tiktoken has it, from our own BPE: bytes first, then merges in order."""
    trained = train_bpe(400, cut(TEXT.encode(), "here"))
    return {trained.decode_bytes([i]): i for i in range(trained.vocab_size)}


@pytest.fixture(scope="module")
def encoding(ranks):
    return tiktoken.Encoding(
        "ours", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
    )


@pytest.fixture(scope="module")
def converted(ranks, tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "gpt2.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return make_tokenizer(str(path), [])


@property_test
@given(st.text(st.sampled_from("Eint Text,größer日😀\n\t 12's")) | st.text())
def test_a_tiktoken_file_counts_as_tiktoken_does(encoding, converted, text):
    ids = encoding.encode_ordinary(text)
    assert converted.encode(text) == ids
    assert converted.decode_bytes([*ids, encoding.eot_token]) == text.encode() + b"<|endoftext|>"


def test_a_tiktoken_encoding_by_name_and_what_is_no_such(encoding, monkeypatch, tmp_path):
    monkeypatch.setattr(tiktoken, "list_encoding_names", lambda: ["ours", "gpt2"])
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    tokenizer = make_tokenizer("tiktoken:ours", [])
    assert tokenizer.encode(TEXT) == encoding.encode_ordinary(TEXT)
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode(TEXT) == tokenizer.encode(TEXT)
    with pytest.raises(ConfigError, match=r"NAME one of ours, gpt2"):
        tokenizer_identity("tiktoken:theirs")
    (tmp_path / "bad.tiktoken").write_text("YQ== 0\nYg==\n")
    with pytest.raises(ConfigError, match=r"line 2 is not a token"):
        tokenizer_identity(str(tmp_path / "bad.tiktoken"))


@pytest.fixture(scope="module", params=["unigram", "bpe", "identity"])
def pieces_model(request):
    identity = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    kinds = {
        "unigram": {"model_type": "unigram", "byte_fallback": True, "vocab_size": 330},
        "bpe": {"model_type": "bpe", "byte_fallback": False, "vocab_size": 70},
        "identity": {"model_type": "bpe", "byte_fallback": True, "vocab_size": 330, **identity},
    }
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=written,
        hard_vocab_limit=False,
        minloglevel=2,
        **kinds[request.param],
    )
    return request.param, written.getvalue()


def test_a_sentencepiece_file_counts_as_its_library_does(pieces_model, tmp_path):
    kind, model = pieces_model
    (tmp_path / "sp.model").write_bytes(model)
    tokenizer, theirs = make_tokenizer(str(tmp_path / "sp.model"), []), sentencepiece.SentencePieceProcessor()
    theirs.LoadFromSerializedProto(model)
    for text in (TEXT, "größer  😀\nZ ", "", " x"):
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text) and tokenizer.decode(ids) == theirs.decode(ids)
        encoded = tokenizer.encode_pieces([Piece(text.encode(), True, "here", 0)])
        covers = encoded.covers.tolist()
        assert sum(covers) == (len(text.encode()) if ids else 0)
        assert encoded.lost == (brute_force(tokenizer, text.encode(), ids, covers) if ids else len(text))
        assert kind != "identity" or (encoded.lost == 0 and tokenizer.decode(ids) == text)
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode(TEXT) == tokenizer.encode(TEXT)
    assert tokenizer_identity(str(tmp_path)) == tokenizer.sha256


def test_byte_tokens_of_sentencepiece_have_a_byte_each_and_other_files_are_one_line(pieces_model, tmp_path):
    kind, model = pieces_model
    (tmp_path / "sp.model").write_bytes(model)
    if kind == "identity":
        tokenizer = make_tokenizer(str(tmp_path / "sp.model"), [])
        encoded = tokenizer.encode_pieces([Piece("🦜é".encode(), True, "here", 0)])
        assert encoded.covers.tolist() == [1] * 6
        assert tokenizer.decode_bytes(encoded.ids[:3]) == "🦜".encode()[:3]
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="not a SentencePiece model") as error:
        tokenizer_identity(str(tmp_path / "bad.model"))
    assert "\n" not in str(error.value)


def test_a_name_on_the_hub_is_found_and_a_failure_says_what_was_tried(tmp_path, monkeypatch):
    """The hub's own cache, as a download leaves it; nothing goes over a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--theirs"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (snapshot / "tokenizer.json").write_text(byte_level().to_str(), encoding="utf-8")
    for spec in ("hf:someone/theirs", "someone/theirs", "hf:someone/theirs@main"):
        assert make_tokenizer(spec, []).sha256 == JsonTokenizer(byte_level().to_str()).sha256
    for spec in ("hf:someone/other", "someone/other@v2"):
        with pytest.raises(ConfigError, match=r"tokenizer\.json or tokenizer\.model of someone/other") as error:
            tokenizer_identity(spec)
        assert "\n" not in str(error.value) and f"data.tokenizer = {spec}" in str(error.value)
