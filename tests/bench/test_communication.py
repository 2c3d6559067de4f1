"""Bytes between processes that share a sequence, counted and by formula."""

from __future__ import annotations

from pathlib import Path

import pytest

from transformer_vq.bench import communication, context
from transformer_vq.bench.communication import SIZES, Sizes, ours, ring, run


@pytest.mark.distributed
def test_traffic_is_what_the_formula_says_and_constant_in_the_length() -> None:
    rows = run(lengths=(64, 4096), processes=(2, 8), sizes=Sizes(K=8, V=4, S=16, M=8))
    assert [(row["tokens"], row["processes"], row["counted"]) for row in rows] == [
        (64, 2, True),
        (4096, 2, True),
        (64, 8, False),
        (4096, 8, False),
    ]
    assert len({(row["forward"], row["backward"]) for row in rows}) == 1
    assert rows[1]["ring_forward"] == 64 * rows[0]["ring_forward"]


def test_counts_that_differ_from_the_formula_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Sizes(K=8, V=4, S=16, M=8)
    right = (*ours(sizes), *ring(64, 2, sizes))
    monkeypatch.setattr(communication, "count", lambda *_: {64: (right[0] + 1, *right[1:])})
    with pytest.raises(RuntimeError, match="64 tokens on 2 processes"):
        run(lengths=(64,), processes=(2,), sizes=sizes)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("evaluation", [False, True])
def test_a_cut_step_is_timed_beside_a_whole_one(evaluation: bool) -> None:
    (row,) = context.run(lengths=(512,), repeats=1, evaluation=evaluation, layers=1)
    assert (row["tokens"], row["processes"]) == (512, 2)
    assert row["alone_ms"] / row["cut_ms"] == pytest.approx(row["speedup"])


def test_the_page_holds_what_the_formulas_say() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    table = page.split("| ring over ours |\n")[1].split("\n\n")[0].splitlines()[1:]
    rows = [[float(cell.replace(",", "")) for cell in line.strip("|").split("|")] for line in table]
    assert len(rows) == 16
    for tokens, processes, kib, mib, ratio in rows:
        own, theirs = sum(ours(SIZES)), sum(ring(int(tokens), int(processes), SIZES))
        assert (kib, mib) == (round(own / 2**10, 1), round(theirs / 2**20)) and ratio == round(theirs / own)
