"""An evaluation that processes share gives the numbers of one process, whatever does not share out evenly."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from crew_processes import PIECE, numbers, texts
from many_processes import torchrun

from transformer_vq.evaluation import language
from transformer_vq.evaluation.crew import ALONE, Crew

TESTS = Path(__file__).parents[1]


def test_every_call_is_made_once_and_all_make_as_many_rounds():
    for size in (1, 2, 3, 7):
        for courses in ([], [1], [1] * 10, [5, 1, 1, 2], [4, 4, 9, 1]):
            turns = [Crew(rank, size).turns(courses) for rank in range(size)]
            assert len({len(turn) for turn in turns}) == 1
            made = [turn[:2] for mine in turns for turn in mine if turn is not None]
            assert sorted(made) == [(course, call) for course, calls in enumerate(courses) for call in range(calls)]
            for mine in turns:
                assert [turn for turn in mine if turn] == sorted(turn for turn in mine if turn), "a course in order"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_course_longer_than_a_share_is_made_by_all(size):
    courses = [2, 9, 3, 1]
    line = SimpleNamespace()
    crews = [Crew(rank, size, lines=dict.fromkeys(range(2, size + 1), line)) for rank in range(size)]
    turns = [crew.turns(courses, [True] * 4) for crew in crews]
    assert len({len(turn) for turn in turns}) == 1
    made = [turn for mine in turns for turn in mine if turn is not None]
    assert sorted(turn[:2] for turn in made) == [
        (course, i) for course, calls in enumerate(courses) for i in range(calls)
    ]
    for number, round_ in enumerate(zip(*turns, strict=True)):
        if size > 1 and number < -(-9 // size):  # the long one, before all others
            calls = [turn.call for turn in round_ if turn is not None]
            assert calls == list(range(number * size, min((number + 1) * size, 9)))
            assert all(turn.course == 1 and turn.beside == len(calls) for turn in round_ if turn is not None)
        else:
            assert all(turn.beside == 1 for turn in round_ if turn is not None)
    for forbidden in ([True, False, True, True], []):
        assert all(turn.beside == 1 for crew in crews for turn in crew.turns(courses, forbidden) if turn is not None)


def test_alone_an_error_comes_at_once():
    made = []
    with pytest.raises(KeyError):
        ALONE.work([1, 1, 1], lambda turn: made.append(turn.course) or {}[turn.course], lambda: None, 3)
    assert made == [0]


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_find_what_one_finds(tmp_path, monkeypatch, size):
    """Bit for bit, but for the Gram matrices of keys, which are added up by process; to rounding with cut parameters,
    and of texts that all read together, unless a layer keeps every key.

    And what stops one process stops all.
    """
    torchrun(size, str(TESTS / "crew_processes.py"), str(tmp_path))
    monkeypatch.setattr(language, "PIECE", PIECE)
    alone = json.loads(json.dumps(numbers(ALONE)))
    wanted = json.loads(json.dumps(texts(ALONE)))
    for rank in range(size):
        assert (tmp_path / f"stopped-{rank}").exists()
        found = json.loads((tmp_path / f"numbers-{rank}.json").read_text())
        for kind, want in alone.items():
            assert found[kind].keys() == want.keys()
            for key, value in want.items():
                inexact = key.endswith("key_rank") or kind == "histograms"
                assert found[kind][key] == (pytest.approx(value, rel=1e-9) if inexact else value), (kind, key)
        cut = json.loads((tmp_path / f"numbers-{rank}-cut.json").read_text())
        for kind in alone:
            for key, value in alone[kind].items():
                close = value if isinstance(value, str | dict) else pytest.approx(value, rel=1e-6)
                assert cut[kind][key] == close or kind == "position", (kind, key)
        for name in ("", "-cut"):
            check_texts(json.loads((tmp_path / f"texts-{rank}{name}.json").read_text()), wanted, cut=bool(name))


def check_texts(written, wanted, cut):
    found, sent = written
    assert sent[max(sent)] > 0, "all read the same text"
    assert cut or found.keys() == wanted.keys()
    for kind, scores in found.items():
        assert scores.keys() == wanted[kind].keys()
        for key, value in wanted[kind].items():
            exact = isinstance(value, str) or value is None or (kind == "every key" and not cut)
            assert scores[key] == (value if exact else pytest.approx(value, rel=1e-10)), (kind, key)
