"""Datasets go on from where they were, and parts of streams begin near where the one before ended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from transformer_vq.config import ConfigError, DataConfig, RunConfig, validate
from transformer_vq.data import documents, prepare, rows, tokenizing
from transformer_vq.data.documents import SPLITS, Piece, cut, take
from transformer_vq.data.places import Part, Place, Reading, carve

ROWS = [f"Row {i}: größer; weiter.\n" * (i % 5) for i in range(420)]
BATCH = 30
CASES: dict[str, dict[str, Any]] = {
    "carved": {},
    "limited": {"max_bytes": 7001},
    "separated": {"document_separator": ";"},
    "merged": {"tokenizer": "bpe:300"},
    "shuffled": {"shuffle": 40},
    "downloaded": {"streaming": False},
}


def write(folder: Path, kind: str, names: tuple[str, ...]) -> Path:
    """The rows in files of 60, then in the splits that `names` say."""
    folder.mkdir()
    for at in range(0, len(ROWS), 60):
        split = names[-1] if at >= 360 else names[at // 180 % len(names)]
        some, path = ROWS[at : at + 60], folder / f"{split}-{at:04d}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.table({"text": some, "id": list(range(60))}), path)
        else:
            path.write_text("".join(json.dumps({"text": row, "id": 1}) + "\n" for row in some), encoding="utf-8")
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Small groups, pieces and batches, each group noted; the numbers of rows as they are read."""
    for module, name, value in ((tokenizing, "GROUP", 1000), (documents, "PIECE", 64), (rows, "ROWS", BATCH)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(tokenizing, "OFTEN", 0.0)
    read: list[int] = []
    text_of = rows.text_of
    monkeypatch.setattr(rows, "text_of", lambda *args: read.append(args[2]) or text_of(*args))
    return read


class Stopped(BaseException):
    """As Ctrl-C."""


def stop_at(config: DataConfig, call: int) -> int:
    """Prepare until so many groups are read; how many that were."""
    calls = 0

    def progress(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Stopped

    with suppress(Stopped):
        prepare(config, progress)
    return calls


QUICK = {("limited", "parquet", 1), ("shuffled", "jsonl", 3)}


@pytest.mark.parametrize(
    ("case", "kind", "names"),
    [
        pytest.param(case, kind, names, marks=() if (case, kind, len(names)) in QUICK else pytest.mark.slow)
        for case in CASES
        for kind in ("parquet", "jsonl")
        for names in (("train",), ("train", "validation", "test"))
    ],
)
def test_a_dataset_goes_on_where_it_was(
    tmp_path: Path, small: list[int], case: str, names: tuple[str, ...], kind: str
) -> None:
    """The entry is that of a process that was not stopped, to the byte, and few rows are read twice."""
    settings = {"source": f"hf:{write(tmp_path / 'rows', kind, names)}", "streaming": True, **CASES[case]}
    whole = prepare(DataConfig(**settings, cache=str(tmp_path / "whole"))).folder
    calls = stop_at(DataConfig(**settings, cache=str(tmp_path / "count")), 0)
    assert calls > 5
    quick = (case, kind, len(names)) in QUICK
    for call in (calls // 3, calls - 1) if quick else (1, calls // 3, calls - 3, calls - 1):
        config = DataConfig(**settings, cache=str(tmp_path / f"stopped {call}"))
        stop_at(config, call)
        small.clear()
        after = stop_at(config, call + 1 if case == "carved" else 0)  # and once more
        reread = len(small)
        folder = prepare(config).folder
        for path in whole.iterdir():
            assert path.read_bytes() == (folder / path.name).read_bytes(), (call, path.name)
        if case != "carved":
            assert after == calls - call
        if call >= calls - 3:
            assert reread < 5 * max(BATCH, CASES[case].get("shuffle", 0)), "of 420 rows"


def test_a_shuffled_dataset_has_all_rows_in_another_order(tmp_path: Path, small: list[int]) -> None:
    source = f"hf:{write(tmp_path / 'rows', 'parquet', ('train', 'validation', 'test'))}"
    settings = {"source": source, "streaming": True, "cache": str(tmp_path / "cache")}
    plain, mixed, again = (prepare(DataConfig(**settings, shuffle=shuffle)) for shuffle in (None, 40, 40))
    assert mixed.folder == again.folder != plain.folder
    for name in SPLITS:
        texts = []
        for corpus in (plain, mixed):
            file = corpus.splits[name]
            edges = [*file.documents.tolist(), len(file)]
            texts.append([bytes(file.tokens[a:b]) for a, b in pairwise(edges)])
        assert texts[0] != texts[1] and sorted(texts[0]) == sorted(texts[1])


def test_rows_are_shuffled_only_as_a_stream() -> None:
    with pytest.raises(ConfigError, match=r"data\.shuffle = 40: needs streaming = true"):
        validate({"data": {"source": "hf:a/b", "shuffle": 40}}, RunConfig)


class Letters:
    """A stream of batches of three documents of five letters."""

    def __init__(self) -> None:
        self.place: Place | None = None
        self.began: list[int] = []

    def before(self, place: Place) -> int | None:
        return place.bytes

    def __call__(self, place: Place | None = None) -> Iterator[Piece]:
        first = 0 if place is None else place.at
        self.began.append(first)
        for batch in range(first, 8):
            self.place = Place(batch, 15 * batch)
            for i in range(3):
                yield from cut(bytes([97 + batch]) * 4 + b"%d" % i, "letters")


@pytest.mark.parametrize("border", ["byte", "document"])
@pytest.mark.parametrize("place", [None, *range(8)])
@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 61), (31, 80), (44, 45), (50, 119)])
def test_a_part_is_the_same_from_any_place_before_it(border, place, start, stop) -> None:
    letters = Letters()
    part = Part(letters, lambda: (start, stop), border)
    letters.place = None if place is None else Place(place, 15 * place)
    assert list(part()) == list(take(Letters()(), start, stop, border))
    assert letters.began == [place if place is not None and 15 * place <= start else 0]


def test_parts_that_are_carved_begin_where_the_one_before_ended() -> None:
    letters = Letters()
    parts = carve(letters, SPLITS, "byte")
    read = {name: b"".join(piece.text for piece in part()) for name, part in parts.items()}
    assert b"".join(read.values()) == b"".join(piece.text for piece in Letters()())
    assert letters.began == [0, 0, 7, 7]  # measured, train, valid, test


def test_a_reading_says_where_its_last_piece_lies() -> None:
    letters = Letters()
    reading = Reading(letters, letters())
    marks = [(reading.place, reading.since) for _ in reading]
    assert marks == [(Place(batch, 15 * batch), i + 1) for batch in range(8) for i in range(3)]
    place, since = marks[10]
    rest = Reading(letters, letters(place), since)
    pieces = list(rest)
    assert pieces == list(Letters()())[11:] and (rest.place, rest.since) == marks[-1]
