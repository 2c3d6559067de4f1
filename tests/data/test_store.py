import hashlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from transformer_vq.config import ConfigError, DataConfig
from transformer_vq.data import check_lengths, default_cache, documents, prepare, store, tokenizing
from transformer_vq.data.documents import Piece, cut
from transformer_vq.data.words import WordCounter

TEXT = "".join(f"Line {i}: größer und weiter.\n" for i in range(3000))


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def settings_for(book, **more):
    return DataConfig(source=str(book), cache=str(book.parent / "cache"), **more)


def whole_text(corpus):
    return b"".join(corpus.tokenizer.decode_bytes(file.tokens.tolist()) for file in corpus.splits.values())


def entries(cache):
    return sorted(path.name for path in Path(cache).iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_tokens_are_the_text(book, tokenizer):
    corpus = prepare(settings_for(book, tokenizer=tokenizer))
    assert list(corpus.splits) == ["train", "valid", "test"]
    assert whole_text(corpus) == TEXT.encode()
    assert sum(file.bytes for file in corpus.splits.values()) == len(TEXT.encode())
    for file in corpus.splits.values():
        text = corpus.tokenizer.decode_bytes(file.tokens.tolist())
        assert file.words == len(text.split())
        assert file.bytes == len(text)
        assert file.documents.tolist() == [0]
        assert isinstance(file.tokens, np.memmap)
        assert not file.tokens.flags.writeable
        assert file.tokens.dtype == (np.uint8 if tokenizer == "bytes" else np.uint16)


def test_the_corpus_is_named_by_its_text_whatever_the_tokenizer(book):
    by_bytes = prepare(settings_for(book))
    assert by_bytes.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert prepare(settings_for(book, tokenizer="bpe:300")).sha256 == by_bytes.sha256
    description = by_bytes.describe()
    assert by_bytes.sha256 in description
    assert str(book) in description
    assert f"train {by_bytes.splits['train'].bytes:,} bytes" in description
    assert "\n" not in description


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_documents_begin_after_the_separator(book, tokenizer):
    parts = ["eins\0", "zwei und größer\0", "\0", "drei\0"] * 200
    book.write_text("".join(parts), encoding="utf-8")
    corpus = prepare(settings_for(book, tokenizer=tokenizer, document_separator="\0"))
    train = corpus.splits["train"]
    edges = [*train.documents.tolist(), len(train)]
    decoded = [corpus.tokenizer.decode(train.tokens[a:b].tolist()) for a, b in pairwise(edges)]
    assert decoded[:-1] == parts[: len(decoded) - 1]
    assert parts[len(decoded) - 1].startswith(decoded[-1])
    assert train.documents.dtype == np.int64


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_each_file_is_a_document(tmp_path, tokenizer):
    texts = [f"file {i} " * (i + 1) for i in range(6)]
    for i, text in enumerate(texts):
        (tmp_path / f"train{i}.txt").write_text(text)
    (tmp_path / "valid.txt").write_text("some text")
    (tmp_path / "test.txt").write_text("other text")
    config = DataConfig(source=str(tmp_path), cache=str(tmp_path / ".cache"), tokenizer=tokenizer)
    train = prepare(config).splits["train"]
    edges = [*train.documents.tolist(), len(train)]
    assert [train.tokenizer.decode(train.tokens[a:b]) for a, b in pairwise(edges)] == texts


def test_max_eval_bytes_shortens_valid_and_test_alone(book):
    whole, short = prepare(settings_for(book)), prepare(settings_for(book, max_eval_bytes=100))
    for name in ("train", "valid", "test"):
        expected = whole.splits[name].tokens if name == "train" else whole.splits[name].tokens[:100]
        assert np.array_equal(short.splits[name].tokens, expected)


def test_max_bytes_keeps_the_beginning_of_each_split(book):
    whole, short = prepare(settings_for(book)), prepare(settings_for(book, max_bytes=500))
    for name, file in short.splits.items():
        assert file.bytes == 500
        assert np.array_equal(file.tokens, whole.splits[name].tokens[:500])


def test_a_second_time_nothing_is_read(book, monkeypatch):
    first = prepare(settings_for(book, tokenizer="bpe:300"))
    monkeypatch.setattr(store, "write_entry", lambda *_: pytest.fail("tokenized again"))
    again = prepare(settings_for(book, tokenizer="bpe:300"))
    assert again.describe() == first.describe()
    assert again.folder == first.folder
    book.rename(book.parent / "moved.txt")
    (book.parent / "moved.txt").rename(book)
    os.utime(book, (0, 0))
    assert prepare(settings_for(book, tokenizer="bpe:300")).folder == first.folder


def test_the_key_follows_all_that_changes_tokens(book):
    changes = [{}, {"tokenizer": "bpe:300"}, {"tokenizer": "bpe:301"}, {"document_separator": "\n"}, {"max_bytes": 99}]
    folders = [prepare(settings_for(book, **change)).folder for change in changes]
    book.write_text(TEXT + ".", encoding="utf-8")
    folders.append(prepare(settings_for(book)).folder)
    assert len(set(folders)) == len(changes) + 1
    same = [{"order": "streams"}, {"document_boundaries": "reset"}, {"streaming": True}]
    assert {prepare(settings_for(book, **change)).folder for change in same} == {folders[-1]}


def run_python(code, *args):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)], capture_output=True, text=True, timeout=120
    )


KILLED = """
    import os, signal, sys
    from transformer_vq.config import DataConfig
    from transformer_vq.data import documents, prepare, store, tokenizing
    source, when, cache, tokenizer, often = sys.argv[1:]
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    tokenizing.GROUP, documents.PIECE, tokenizing.OFTEN, calls, progress = 1000, 500, float(often), [], None
    if when == "before the rename":
        store.flush = die
    elif when.isdigit():
        progress = lambda name, size: calls.append(size) or (len(calls) == int(when) and die())
    else:
        setattr(tokenizing.Writer, when, die)
    prepare(DataConfig(source=source, cache=cache, tokenizer=tokenizer, document_separator="7:"), progress)
"""


@pytest.mark.parametrize(
    ("when", "tokenizer", "often", "again"),
    [
        ("20", "bytes", "1e9", (80, 90)),  # before anything was noted: all anew
        pytest.param("1", "bytes", "0", (79, 89), marks=pytest.mark.slow),
        ("20", "bpe:300", "0", (60, 70)),
        pytest.param("79", "bpe:300", "0", (1, 10), marks=pytest.mark.slow),  # in another split
        pytest.param("_documents", "bpe:300", "0", (1, 10), marks=pytest.mark.slow),  # while train is being finished
        pytest.param("forget", "bpe:300", "0", (1, 10), marks=pytest.mark.slow),
        ("before the rename", "bpe:300", "0", (0, 0)),
    ],
)
def test_killed_while_writing_leaves_no_entry_and_the_next_one_goes_on(
    book, monkeypatch, when, tokenizer, often, again
):
    """The entry that comes out is that of a process that was not killed, to the byte."""
    cache, whole = book.parent / "cache", book.parent / "whole"
    died = run_python(KILLED, book, when, cache, tokenizer, often)
    assert died.returncode == -signal.SIGKILL, died.stderr
    (left,) = entries(cache)
    assert left.startswith(".") and left.endswith(".part")
    monkeypatch.setattr(tokenizing, "GROUP", 1000)
    monkeypatch.setattr(documents, "PIECE", 500)
    add, added = tokenizing.Writer.add, []
    monkeypatch.setattr(tokenizing.Writer, "add", lambda self, group: added.append(1) or add(self, group))
    setting = {"tokenizer": tokenizer, "document_separator": "7:"}
    corpus = prepare(settings_for(book, **setting))
    assert again[0] <= len(added) <= again[1]
    assert whole_text(corpus) == TEXT.encode()
    assert entries(cache) == [corpus.folder.name]
    other = prepare(DataConfig(source=str(book), cache=str(whole), **setting)).folder
    assert [path.name for path in sorted(other.iterdir())] == [path.name for path in sorted(corpus.folder.iterdir())]
    for path in other.iterdir():
        assert path.read_bytes() == (corpus.folder / path.name).read_bytes(), path.name


def test_an_entry_appears_at_once_and_flushed(book, monkeypatch):
    """It is the very folder that was flushed under another name, renamed: at no moment is it there and not whole."""
    flushed, flush = [], store.flush

    def record(path):
        flushed.append((path.name, path.stat().st_ino))
        flush(path)

    monkeypatch.setattr(store, "flush", record)
    folder = prepare(settings_for(book)).folder
    inodes = [inode for _, inode in flushed]
    assert {path.stat().st_ino for path in folder.iterdir()} < set(inodes)
    assert inodes[-2:] == [folder.stat().st_ino, folder.parent.stat().st_ino]
    assert flushed[-2][0] == f".{folder.name}.part"


def prepare_and_report(book, barrier, queue):
    barrier.wait()
    written = []
    corpus = prepare(settings_for(book, tokenizer="bpe:300"), lambda name, size: written.append(name))
    queue.put((bool(written), corpus.sha256, [int(file.tokens.sum()) for file in corpus.splits.values()]))


def test_processes_that_race_tokenize_once(book):
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    workers = [context.Process(target=prepare_and_report, args=(book, barrier, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    reports = [queue.get(timeout=100) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(wrote for wrote, _, _ in reports) == [False, True]
    assert reports[0][1:] == reports[1][1:]
    assert len(entries(book.parent / "cache")) == 1


def test_a_truncated_token_file_is_made_again(book):
    corpus = prepare(settings_for(book))
    file = corpus.folder / "train.tokens"
    file.write_bytes(file.read_bytes()[:-10])
    assert whole_text(prepare(settings_for(book))) == TEXT.encode()


def test_a_full_disk_is_one_line_and_leaves_nothing(book, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "flush", full)
    with pytest.raises(ConfigError, match=r"data\.cache = .*No space left on device"):
        prepare(settings_for(book))
    assert entries(book.parent / "cache") == []


def test_a_cache_that_cannot_be_made_is_one_line(book):
    config = DataConfig(source=str(book), cache=str(book / "inside a file"))
    with pytest.raises(ConfigError, match=r"data\.cache"):
        prepare(config)


def test_invalid_utf8_names_file_and_byte_and_leaves_nothing(book):
    content = TEXT.encode() * 10
    at = content.index(b"\n", 700_000)
    book.write_bytes(content[:at] + b"\xff" + content[at:])
    with pytest.raises(ConfigError, match=rf"book\.txt is not UTF-8 at byte {at}; only data\.tokenizer = bytes"):
        prepare(settings_for(book, tokenizer="bpe:300"))
    assert entries(book.parent / "cache") == []
    assert prepare(settings_for(book)).splits["train"].bytes == 9 * (len(content) + 1) // 10


def test_a_corpus_too_small_to_be_split_is_one_line(book):
    book.write_text("short")
    with pytest.raises(ConfigError, match="no text for valid"):
        prepare(settings_for(book))
    assert entries(book.parent / "cache") == []


def test_unknown_tokens_are_told(book):
    library = Library(models.WordLevel({"[UNK]": 0, "Line": 1}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.save(str(book.parent / "words.json"))
    corpus = prepare(settings_for(book, tokenizer=str(book.parent / "words.json")))
    assert any("12,0" in note and "unknown" in note for note in corpus.notes)


def test_a_bpe_that_finds_no_more_pairs_is_told(book):
    book.write_text("ab " * 1000)
    corpus = prepare(settings_for(book, tokenizer="bpe:5000"))
    assert corpus.tokenizer.vocab_size < 5000
    assert f"pairs to merge for {corpus.tokenizer.vocab_size} tokens only" in corpus.describe()


def test_too_short_for_a_window_is_one_line(book):
    book.write_text("x" * 100)
    corpus = prepare(settings_for(book))
    check_lengths(corpus, 89)
    with pytest.raises(ConfigError, match=r"train of .* has 90 tokens; at least 91 for train\.seq_len = 90"):
        check_lengths(corpus, 90)
    with pytest.raises(ConfigError, match=r"at least 97 for 4 streams of train\.seq_len = 24"):
        check_lengths(corpus, 24, streams=4)
    with pytest.raises(ConfigError, match=r"at least 97 for 4 streams of train\.seq_len = 12, 2 updates a sequence"):
        check_lengths(corpus, 12, streams=4, updates=2)
    book.write_text("x" * 20)
    with pytest.raises(ConfigError, match=r"valid of .* has 1 tokens; at least 2 for an evaluation"):
        check_lengths(prepare(settings_for(book)), 5)


def test_progress_reports_bytes_of_each_split(book):
    reports = {}
    corpus = prepare(settings_for(book), reports.__setitem__)
    assert reports == {name: file.bytes for name, file in corpus.splits.items()}


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert default_cache() == tmp_path / "transformer_vq" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "transformer_vq" / "tokens"


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text(alphabet="ab \n\t\0é"), max_size=5), st.integers(1, 6))
def test_words_are_counted_over_pieces(texts, size):
    counter = WordCounter()
    for text in texts:
        content = text.encode()
        for at in range(0, len(content), size):
            counter.read(Piece(content[at : at + size], at == 0, "here", at))
    assert counter.words == sum(len(text.encode().split()) for text in texts)


def test_groups_are_bounded_and_complete():
    pieces = list(cut(os.urandom(9_000_000), "here"))
    together = list(tokenizing.groups(pieces))
    assert [piece for group in together for piece in group] == pieces
    assert all(sum(len(piece.text) for piece in group) < tokenizing.GROUP + (1 << 18) for group in together)
    assert len(together) == 3


def test_the_builtin_corpus_prepares(tmp_path):
    corpus = prepare(DataConfig(cache=str(tmp_path)))
    train = corpus.splits["train"]
    assert train.bytes == len(train) > 4_000_000
    assert len(train.documents) > 300
    check_lengths(corpus, 2048)


def test_preparing_needs_no_torch(book):
    code = """
        import sys
        from transformer_vq.config import DataConfig
        from transformer_vq.data import check_lengths, prepare
        check_lengths(prepare(DataConfig(source=sys.argv[1], cache=sys.argv[2])), 10)
        sys.exit("torch" in sys.modules)
    """
    assert run_python(code, book, book.parent / "cache").returncode == 0


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_a_separator_as_a_shell_hands_it_on(book, tokenizer):
    book.write_text("ein Absatz\n\nnoch einer\n\n" * 300)
    typed = prepare(settings_for(book, tokenizer=tokenizer, document_separator="\\n\\n"))
    assert typed.folder == prepare(settings_for(book, tokenizer=tokenizer, document_separator="\n\n")).folder
    assert len(typed.splits["train"].documents) > 500
    assert not any("nowhere" in note for note in typed.notes)


@pytest.mark.parametrize(
    ("more", "note"),
    [
        ({"document_separator": "<|end|>"}, r"data\.document_separator = b'<\|end\|>' stands nowhere in the text"),
        (
            {"document_boundaries": "reset"},
            r"data\.document_boundaries = reset changes nothing: every split is a single",
        ),
        ({"field": "body"}, r"data\.field = body names nothing"),
        ({"streaming": True}, r"data\.streaming changes nothing"),
        ({"max_bytes": 10**6}, r"data\.max_bytes = 1,000,000 cuts nothing off: train and valid and test"),
        ({"max_eval_bytes": 10**6}, r"data\.max_eval_bytes = 1,000,000 cuts nothing off: valid and test"),
    ],
)
def test_a_setting_without_effect_is_said(book, more, note):
    assert any(re.match(note, found) for found in prepare(settings_for(book, **more)).notes)
    assert len(prepare(settings_for(book)).notes) == 1


def test_a_bpe_and_a_separator_inside_a_character_are_one_line(book):
    with pytest.raises(ConfigError, match="is not UTF-8"):
        prepare(settings_for(book, tokenizer="bpe:300", document_separator="\\xc3"))


def test_the_shares_that_came_out_are_kept_with_the_tokens(tmp_path):
    (tmp_path / "b.txt").write_text("".join(f"{i}\n" for i in range(1, 12001)))
    for i in range(1, 5):
        (tmp_path / f"s{i}.txt").write_text("word\n")
    config = DataConfig(source=str(tmp_path), cache=str(tmp_path / ".cache"))
    first, again = prepare(config), prepare(config)
    assert first.notes == again.notes
    assert any("split 90/5/5 by position" in note for note in first.notes)
    total = sum(file.bytes for file in first.splits.values())
    assert [round(100 * file.bytes / total, 2) for file in first.splits.values()] == [90, 5, 5]
