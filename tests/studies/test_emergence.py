"""When seeds learn: against textbook numbers, and from runs whose numbers are known."""

from __future__ import annotations

import json
import math
import warnings

import pandas as pd
import pytest
import toy_runs

from transformer_vq.config import ConfigError
from transformer_vq.studies.emergence import emergence
from transformer_vq.studies.folder import write_status
from transformer_vq.studies.plan import load_study
from transformer_vq.studies.report import write_report
from transformer_vq.studies.results import collect
from transformer_vq.studies.statistics import log_rank, survival

# Weeks of remission of leukaemia patients under 6-MP and placebo (Freireich 1963, as in Cox & Oakes): medians 23 and 8,
# log-rank chi² 16.79 on one degree of freedom, p = 4.17e-5; S(10) under 6-MP is 0.753, S(23) 0.448.
DRUG = [(6, 1), (6, 1), (6, 1), (7, 1), (10, 1), (13, 1), (16, 1), (22, 1), (23, 1), (6, 0), (9, 0), (10, 0), (11, 0)]
DRUG += [(17, 0), (19, 0), (20, 0), (25, 0), (32, 0), (32, 0), (34, 0), (35, 0)]
PLACEBO = [(t, 1) for t in (1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23)]


def test_survival_and_log_rank_of_freireichs_data():
    drug, placebo = (survival([t for t, _ in data], [bool(e) for _, e in data]) for data in (DRUG, PLACEBO))
    assert (drug.median, placebo.median) == (23, 8)
    share = dict(zip(drug.times, drug.share, strict=True))
    assert share[10] == pytest.approx(0.753, abs=5e-4) and share[23] == pytest.approx(0.448, abs=5e-4)
    assert drug.low[0] < drug.share[0] < drug.high[0]
    both = [*DRUG, *PLACEBO]
    p = log_rank([t for t, _ in both], [bool(e) for _, e in both], [0] * len(DRUG) + [1] * len(PLACEBO))
    assert p == pytest.approx(4.17e-5, rel=5e-3)


def test_what_tells_nothing_has_no_number_and_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(log_rank([5, 5], [False, False], [0, 1])) and math.isnan(
            log_rank([1, 2], [True, True], [0, 0])
        )
        assert log_rank([5, 5, 5, 5], [True] * 4, [0, 0, 1, 1]) == 1.0
        assert math.isnan(survival([5, 5], [False, False]).median) and math.isnan(survival([], []).median)
        assert survival([4], [True]).median == 4 and survival([1, 2, 3, 4], [True, True, False, False]).median == 2


def studied(write_toy, times: dict[str, list[int | None]], **settings):
    """A study whose arms emerge at those steps of 20; None: never; -1: the run diverges."""
    wanted = {"emergence": {"metric": "accuracy", "at": 0.9}, "metrics": {"accuracy": "max"}, **settings}
    study = load_study(
        write_toy(
            *times, seeds=list(range(len(next(iter(times.values()))))), **{"overrides": {"eval.every": 2}, **wanted}
        )
    )
    for run in study.final_runs({}):
        toy_runs.run(run.settings) if run.arm in toy_runs.OFFSETS else run.folder.mkdir(parents=True)
        time = times[run.arm][run.seed]
        records = [
            {
                "step": step,
                "tokens": 100 * step,
                "split": "valid",
                "accuracy": 0.95 if time and step >= time > 0 else 0.1,
            }
            for step in range(2, 21 if time != -1 else 7, 2)
        ]
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        if time == -1:
            (run.folder / "summary.json").unlink(missing_ok=True)
            write_status(run.folder, state="diverged", error="nan")
        else:
            summary = {"test": {"accuracy": 0.9 + 0.01 * run.seed if time else 0.2}}
            (run.folder / "summary.json").write_text(json.dumps(summary))
            write_status(run.folder, state="done", seconds=1.0)
    return study


def test_arms_by_the_time_at_which_their_seeds_emerge(write_toy):
    study = studied(write_toy, {"ste": [4, 6, 8, 6], "rotation": [10, None, 12, -1], "scale": [None] * 4})
    first, second, third = emergence(collect(study))
    assert (first.emerged, second.emerged, third.emerged) == (4, 2, 0) and first.unit == "tokens"
    assert [a.time for a in second.arrivals] == [1000, 2000, 1200, 2000]  # one that diverged is watched to the end
    assert first.survival.median == 600 and second.survival.median == 1200 and math.isnan(third.survival.median)
    assert first.given.mean == pytest.approx(0.915) and second.given.mean == pytest.approx(0.91) and third.given.n == 0
    assert math.isnan(first.p) and second.p < 0.05 and third.p < 0.01
    assert third.p_corrected == pytest.approx(2 * third.p) and second.reference == "ste"
    write_report(study)
    for kind in ("md", "html"):
        text = (study.folder / f"report.{kind}").read_text(encoding="utf-8")
        assert "Emergence" in text and "2/4" in text and "1,200" in text and "Kaplan" in text
    assert (study.folder / "plots" / "emergence.png").is_file()
    runs = pd.read_csv(study.folder / "runs.csv")
    mine = runs[runs["arm"] == "ste"].sort_values("seed")
    want = [(arrival.time, arrival.emerged) for arrival in emergence(collect(study))[0].arrivals]
    assert list(zip(mine["watched_to"], mine["emerged"], strict=True)) == want


def test_smaller_may_be_better_and_nothing_may_have_run(write_toy):
    below = {"emergence": {"metric": "accuracy", "at": 0.2, "better": "min"}}
    assert emergence(collect(studied(write_toy, {"ste": [4, 6]}, **below)))[0].survival.median == 200
    study = load_study(write_toy("ste", run_dir="nowhere", overrides={"eval.every": 2}, **below))
    assert emergence(collect(study)) == []


@pytest.mark.parametrize("every", [None, 20, 100])
def test_a_study_that_is_not_evaluated_on_the_way_is_refused(write_toy, every):
    with pytest.raises(ConfigError, match=r"emergence: ste has eval\.every = .* no evaluation on the way"):
        load_study(write_toy("ste", overrides={"eval.every": every}, emergence={"metric": "accuracy", "at": 0.9}))
