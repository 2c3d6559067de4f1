from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_vq.data import TokenFile, eval_streams, eval_windows, store, stream_batch, window_batch
from transformer_vq.data.tokenizers import ByteTokenizer

property_test = settings(deadline=None, max_examples=60)


def counting_file(n, documents=(0,)):
    """Token i is i, so that a batch shows its positions."""
    return TokenFile("train", np.arange(n, dtype=np.uint32), np.array(documents, np.int64), n, 1, ByteTokenizer())


def same(a, b):
    return all(torch.equal(x, y) if x is not None else y is None for x, y in zip(a, b, strict=True))


def rows_together(parts):
    return [torch.cat(column) if column[0] is not None else None for column in zip(*parts, strict=True)]


BATCHES = {
    "windows": window_batch,
    "streams": stream_batch,
    "sequences": lambda *args, **kw: stream_batch(*args, updates_per_sequence=2, **kw),
    "pictures": lambda *args, **kw: stream_batch(*args, updates_per_sequence=2, whole=True, **kw),
}


@pytest.mark.parametrize("order", BATCHES)
@property_test
@given(
    seed=st.integers(0, 2**70),
    step=st.integers(0, 10**7),
    borders=st.lists(st.integers(0, 6), max_size=3),
    reset=st.booleans(),
)
def test_a_step_does_not_depend_on_who_makes_which_row(order, seed, step, borders, reset):
    file = counting_file(300, (0, 5, 77, 280))
    make = lambda rows: BATCHES[order](file, seed, step, rows, 6, 8, reset=reset)
    whole = make(range(6))
    edges = [0, *sorted(borders), 6]
    parts = [make(range(a, b)) for a, b in pairwise(edges)]
    assert same(rows_together(parts), whole)
    assert same(make(range(6)), whole)
    assert whole.tokens.shape == whole.labels.shape == (6, 8)
    assert whole.tokens.dtype == whole.labels.dtype == torch.int64
    assert torch.equal(whole.labels, whole.tokens + 1)
    assert (whole.segments is not None) == reset


def test_windows_reach_every_place_evenly():
    file = counting_file(12)
    starts = Counter()
    for step in range(800):
        starts.update(window_batch(file, 3, step, range(4), 4, 5).tokens[:, 0].tolist())
    assert sorted(starts) == list(range(7))
    expected = 3200 / 7
    assert sum((count - expected) ** 2 / expected for count in starts.values()) < 22.5  # chi-square, 6 degrees, 0.1 %


def test_windows_are_numbered_through_the_run():
    """Two steps of four rows are one step of eight."""
    file = counting_file(1000)
    halves = [window_batch(file, 1, step, range(4), 4, 16) for step in (6, 7)]
    assert same(rows_together(halves), window_batch(file, 1, 3, range(8), 8, 16))


def test_seeds_differ():
    file = counting_file(10_000)
    first = {s: window_batch(file, s, 0, range(4), 4, 8).tokens for s in (0, 1, 2**64)}
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2**64])
    streams = {s: stream_batch(file, s, 0, range(4), 4, 8).tokens for s in range(4)}
    assert len({tuple(t[:, 0].tolist()) for t in streams.values()}) > 1


def test_numbers_drawn_stay_as_they_are():
    """A resumed run must find its batches again, whatever the version of NumPy."""
    file = counting_file(10_000)
    assert window_batch(file, 7, 11, range(3), 3, 8).tokens[:, 0].tolist() == [3677, 2146, 3262]
    assert stream_batch(file, 7, 11, range(3), 3, 8).tokens[:, 0].tolist() == [2997, 6325, 9653]


@property_test
@given(
    seed=st.integers(0, 100),
    n=st.integers(40, 400),
    streams=st.integers(1, 4),
    length=st.integers(1, 9),
    every=st.none() | st.integers(1, 5),
)
def test_streams_are_contiguous_until_they_are_fresh(seed, n, streams, length, every):
    file = counting_file(n)
    period = (n - 1) // (streams * length)
    fresh_steps, before = [], None
    for step in range(2 * period + 3):
        batch = stream_batch(file, seed, step, range(streams), streams, length, every)
        assert torch.equal(batch.tokens[:, 1:], batch.tokens[:, :-1] + 1)
        assert torch.equal(batch.labels, batch.tokens + 1)
        assert bool(batch.fresh.any()) == bool(batch.fresh.all())
        if batch.fresh.all():
            fresh_steps.append(step)
        else:
            assert torch.equal(batch.tokens[:, 0], before)
        before = batch.tokens[:, -1] + 1
    assert fresh_steps[0] == 0
    if every is None:
        assert fresh_steps[1] <= period
        assert all(b - a == period for a, b in pairwise(fresh_steps[1:]))
    else:
        assert set(range(0, 2 * period + 3, every)) <= set(fresh_steps)


@pytest.mark.parametrize("some", [1, 2, 3, 100])
def test_documents_of_one_length_are_told_some_at_a_time(monkeypatch, some):
    monkeypatch.setattr(store, "SOME", some)
    for count in range(1, 8):
        starts = [5 * i for i in range(count)]
        assert counting_file(5 * count, starts).documents_have(5)
        assert counting_file(5 * count - 2, starts).documents_have(5), "the last one may be cut short"
        assert not counting_file(5 * count + 1, starts).documents_have(5)
        for odd in range(1, count):
            moved = [start + (i == odd) for i, start in enumerate(starts)]
            assert not counting_file(5 * count, moved).documents_have(5)


@property_test
@given(
    seed=st.integers(0, 100),
    pictures=st.integers(2, 30),
    streams=st.integers(1, 4),
    length=st.integers(1, 9),
    updates=st.integers(1, 4),
)
def test_whole_sequences_are_pictures(seed, pictures, streams, length, updates):
    size = updates * length
    file = counting_file(pictures * size, range(0, pictures * size, size))
    assert file.documents_have(size) and not file.documents_have(size + 1)
    in_epoch = (pictures * size - 1) // (streams * size)
    if in_epoch == 0:
        with pytest.raises(ValueError, match=f"too few for {streams} streams of {size} and a label"):
            stream_batch(file, seed, 0, range(streams), streams, length, updates, True, True)
        return
    seen = []
    for step in range(2 * in_epoch * updates):
        batch = stream_batch(file, seed, step, range(streams), streams, length, updates, True, True)
        assert batch.fresh.all() == batch.fresh.any() == (step % updates == 0)
        assert torch.equal(batch.tokens[:, 0] % size, torch.full((streams,), step % updates * length))
        assert (batch.segments == batch.tokens // size).all()
        seen += (batch.tokens[:, 0] // size).tolist()
    assert max(Counter(seen).values()) <= 3 * updates  # the end of one epoch, a whole one, the beginning of a third


def test_an_epoch_of_streams_reads_each_token_once():
    file = counting_file(1003)
    steps = 1002 // (3 * 10)
    batches = [stream_batch(file, 5, step, range(3), 3, 10) for step in range(3 * steps)]
    begins = next(i for i, b in enumerate(batches) if i > 0 and b.fresh.all())
    tokens = torch.cat([b.tokens.flatten() for b in batches[begins : begins + steps]]).sort().values
    assert torch.equal(tokens, torch.arange(tokens[0], tokens[0] + steps * 30))


@property_test
@given(n=st.integers(2, 200), length=st.integers(1, 30), streams=st.integers(1, 7))
def test_evaluation_in_streams_scores_each_token_once(n, length, streams):
    file = counting_file(n)
    scored, position = [], None
    for i, batch in enumerate(eval_streams(file, length, streams)):
        assert batch.tokens.shape[0] == streams
        assert batch.tokens.shape[1] <= length
        counts = batch.labels != -100
        assert torch.equal(batch.labels[counts], batch.tokens[counts] + 1)
        assert bool((counts.int().diff(dim=1) <= 0).all()), "padding is on the right only"
        assert batch.fresh.tolist() == [i == 0] * streams
        if position is not None:
            assert torch.equal(batch.tokens[:, 0][counts[:, 0]], position[counts[:, 0]]), "a stream goes on"
        position = batch.tokens[:, -1] + 1
        scored += batch.labels[counts].tolist()
    assert sorted(scored) == list(range(1, n))


@property_test
@given(n=st.integers(2, 200), width=st.integers(1, 40), batch_size=st.integers(1, 5))
def test_evaluation_in_windows_scores_each_token_once_with_half_a_window_before(n, width, batch_size):
    scored = []
    for batch in eval_windows(counting_file(n), width, batch_size):
        assert len(batch.tokens) <= batch_size
        assert batch.tokens.shape[1] <= width
        assert batch.fresh.all()
        for tokens, labels in zip(batch.tokens, batch.labels, strict=True):
            counts = labels != -100
            scored += labels[counts].tolist()
            context = torch.arange(1, len(tokens) + 1)[counts]
            enough = torch.minimum(tokens[counts] + 1, torch.tensor(min(width, n - 1) - min(width, n - 1) // 2 + 1))
            assert bool((context >= torch.minimum(enough, torch.tensor(len(tokens)))).all())
    assert scored == list(range(1, n))


@property_test
@given(n=st.integers(2, 100), size=st.integers(1, 20), batch_size=st.integers(1, 5))
def test_evaluation_of_pictures_reads_each_from_its_beginning(n, size, batch_size):
    """The last one may be cut short, as `max_tokens` does."""
    file = counting_file(n, range(0, n, size))
    scored = []
    for batch in eval_windows(file, size, batch_size, reset=True):
        for tokens, labels in zip(batch.tokens, batch.labels, strict=True):
            assert tokens[0] % size == 0 or n <= size
            scored += labels[labels != -100].tolist()
    assert scored == list(range(1, n))


@property_test
@given(st.data())
def test_segments_name_the_document_of_each_token(data):
    n = data.draw(st.integers(20, 120))
    starts = sorted({0, *data.draw(st.lists(st.integers(1, n - 1), max_size=8))})
    file = counting_file(n, starts)
    batches = [
        window_batch(file, 1, 2, range(3), 3, 6, reset=True),
        stream_batch(file, 1, 2, range(3), 3, 6, reset=True),
        *eval_streams(file, 7, 2, reset=True),
        *eval_windows(file, 8, 3, reset=True),
    ]
    for batch in batches:
        assert batch.segments is not None and batch.segments.dtype == torch.int64
        real = batch.labels != -100
        for token, segment in zip(batch.tokens[real].tolist(), batch.segments[real].tolist(), strict=True):
            end = starts[segment + 1] if segment + 1 < len(starts) else n
            assert starts[segment] <= token < end


def test_too_short_shows_the_numbers():
    with pytest.raises(ValueError, match="train has 8 tokens: no window of 8"):
        window_batch(counting_file(8), 0, 0, range(1), 1, 8)
    with pytest.raises(ValueError, match="train has 16 tokens: too few for 2 streams of 8"):
        stream_batch(counting_file(16), 0, 0, range(2), 2, 8)
    assert window_batch(counting_file(9), 0, 0, range(1), 1, 8).tokens.tolist() == [list(range(8))]
    assert stream_batch(counting_file(17), 0, 0, range(2), 2, 8).tokens.tolist() == [list(range(8)), list(range(8, 16))]


def test_the_head_of_a_file_knows_its_bytes_words_and_documents():
    text = b"two words\nand three more\0x y"
    file = TokenFile("test", np.frombuffer(text, np.uint8), np.array([0, 10, 25]), len(text), 7, ByteTokenizer())
    head = file.head(13)
    assert (len(head), head.bytes, head.words, head.documents.tolist()) == (13, 13, 3, [0, 10])
    assert file.head(10).documents.tolist() == [0]
    assert file.head(1000) is file
    assert replace(file, name="x").head(28).name == "x"
