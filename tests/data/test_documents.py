import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_vq.config import DataConfig
from transformer_vq.data import documents
from transformer_vq.data.documents import SPLITS, Piece, cut, read_stream, separator_of, split_at_separator, take
from transformer_vq.data.places import carve

property_test = settings(deadline=None, max_examples=150)
text = st.text(alphabet="ab \n€é😀\0", max_size=200)


@pytest.fixture(autouse=True, scope="module")
def small_pieces():
    """Pieces of a few bytes, so that short texts have many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", 8)
        yield


def joined(pieces):
    return b"".join(piece.text for piece in pieces)


def documents_of(pieces):
    """Texts of the documents in a stream of pieces."""
    found = []
    for piece in pieces:
        if piece.begins:
            found.append(b"")
        found[-1] += piece.text
    return found


@property_test
@given(text)
def test_pieces_are_the_text_and_cut_no_character(text):
    pieces = list(cut(text.encode(), "here"))
    assert joined(pieces) == text.encode()
    at = 0
    for i, piece in enumerate(pieces):
        piece.text.decode()
        assert (piece.begins, piece.offset) == (i == 0, at)
        at += len(piece.text)


@property_test
@given(st.binary(max_size=600))
def test_a_stream_is_cut_like_the_same_bytes_in_memory(content):
    assert list(read_stream(io.BytesIO(content), "here")) == list(cut(content, "here"))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("\\n\\n", b"\n\n"),
        ("\n\n", b"\n\n"),
        ("\\0", b"\0"),
        ("\0", b"\0"),
        ("<|end|>\\n", b"<|end|>\n"),
        ("\\xff", b"\xff"),
        ("\\u00e9é", "éé".encode()),
        ("\\\\newpage", b"\\newpage"),
        ("\\begin{document}", b"\\begin{document}"),
        ("---", b"---"),
    ],
)
def test_escapes_in_a_separator_are_understood(typed, meant):
    assert separator_of(DataConfig(document_separator=typed)) == meant


@st.composite
def separated(draw):
    """Documents made of little else than a separator, each in pieces of one to three bytes."""
    separator = draw(st.sampled_from([b"\0", b"\n\n", b"aba", b"abcab"]))
    texts = draw(
        st.lists(st.lists(st.sampled_from([b"a", b"b", b"c", b"\n", b"\0", separator]), max_size=12), max_size=4)
    )
    pieces, wholes = [], [b"".join(parts) for parts in texts]
    for whole in wholes:
        at = 0
        while at < len(whole):
            size = draw(st.integers(1, 3))
            pieces.append(Piece(whole[at : at + size], at == 0, "here", at))
            at += size
    return separator, wholes, pieces


@settings(property_test, max_examples=500)
@given(separated())
def test_documents_end_with_the_separator(case):
    separator, wholes, pieces = case
    want = []
    for whole in wholes:
        parts = whole.split(separator)
        want += [part + separator for part in parts[:-1]] + [parts[-1]]
    assert documents_of(split_at_separator(pieces, separator)) == [document for document in want if document]


def test_offsets_after_splitting_point_into_the_file():
    content = b"one\0two\0three and more\0\0end"
    for piece in split_at_separator(cut(content, "here"), b"\0"):
        assert content[piece.offset :].startswith(piece.text)


@property_test
@given(st.lists(text, min_size=1, max_size=5), st.integers(0, 300), st.integers(0, 300))
def test_take_cuts_a_stream_as_bytes(texts, a, b):
    pieces = [piece for t in texts for piece in cut(t.encode(), "here")]
    start, stop = min(a, b), max(a, b)
    whole = joined(pieces)
    assert joined(take(pieces, start, stop, "byte")) == whole[start:stop]
    joined(take(pieces, start, stop, "character")).decode()
    taken = list(take(pieces, start, None, "byte"))
    assert joined(taken) == whole[start:]
    assert not taken or taken[0].begins


@property_test
@given(st.lists(text, min_size=1, max_size=5), st.sampled_from(["byte", "character"]))
def test_carved_splits_are_the_whole_in_order(texts, border):
    pieces = [piece for t in texts for piece in cut(t.encode(), "here")]
    splits = carve(lambda: iter(pieces), SPLITS, border)
    parts = [joined(splits[name]()) for name in SPLITS]
    assert b"".join(parts) == joined(pieces)
    n = len(joined(pieces))
    slack = 3 if border == "character" else 0
    assert 0 <= len(parts[0]) - n * 90 // 100 <= slack
    assert 0 <= len(parts[0] + parts[1]) - n * 95 // 100 <= slack
    if border == "character":
        assert all(part.decode() is not None for part in parts)


@property_test
@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(0, 100), st.integers(0, 100))
def test_whole_documents_belong_to_where_they_begin(lengths, a, b):
    """A document is one piece or several."""
    pieces = [Piece(bytes([i]), j == 0, "here", j) for i, n in enumerate(lengths) for j in range(n)]
    start, stop = min(a, b), max(a, b)
    begins = [sum(lengths[:i]) for i in range(len(lengths))]
    want = b"".join(bytes([i]) * n for i, n in enumerate(lengths) if start <= begins[i] < stop)
    assert joined(take(pieces, start, stop, "document")) == want
    splits = carve(lambda: iter(pieces), SPLITS, "document")
    parts = [list(splits[name]()) for name in SPLITS]
    assert [piece for part in parts for piece in part] == pieces
    assert all(part[0].begins for part in parts if part)


def test_of_a_hundred_million_bytes_ninety_five_and_five():
    piece = Piece(bytes(1_000_000), False, "enwik8", 0)
    splits = carve(lambda: iter([piece] * 100), SPLITS, "byte")
    assert [sum(len(p.text) for p in splits[name]()) for name in SPLITS] == [90_000_000, 5_000_000, 5_000_000]
