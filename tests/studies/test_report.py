"""Results and report, from runs whose numbers are known."""

from __future__ import annotations

import html
import json
import math
import re
import warnings

import numpy as np
import pandas as pd
import pytest
import toy_runs
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from transformer_vq.config import ConfigError
from transformer_vq.evaluation.pieces import Piecewise, write_pieces
from transformer_vq.evaluation.plots import shown
from transformer_vq.studies.folder import write_status
from transformer_vq.studies.markdown import Verbatim, clean, escape
from transformer_vq.studies.plan import load_study
from transformer_vq.studies.report import write_report
from transformer_vq.studies.results import collect, curve, failures, health, table
from transformer_vq.studies.run import choose
from transformer_vq.studies.words import _at_the_edge, picture_name, verdict

PRIMARY = {"primary": {"levels": {"model.quantizer.estimator": "rotation"}}, "equivalence": 0.01}


def load_and_run(path):
    """The study, with its runs made in this process: quick."""
    study = load_study(path)
    for stage in (study.tuning_runs, lambda: study.final_runs(choose(study, study.tuning_runs()))):
        for run in stage():
            run.folder.mkdir(parents=True, exist_ok=True)
            try:
                toy_runs.run(run.settings)
                write_status(run.folder, state="done", seconds=1.0)
            except toy_runs.TrainingDiverged as error:
                write_status(run.folder, state="diverged", error=str(error), seconds=1.0)
    return study


def test_comparisons_are_paired_by_seed(write_toy):
    study = load_and_run(write_toy("ste", "rotation", "scale", seeds=list(range(8)), **PRIMARY))
    results = collect(study)
    primary, other = results.comparisons
    a, b = (results.values(name, "bits_per_byte") for name in ("rotation", "ste"))
    assert primary.primary and primary.arm == "rotation" and not other.primary
    assert primary.difference.mean == pytest.approx(np.mean([a[seed] - b[seed] for seed in range(8)]))
    assert primary.difference.sd < 0.03 < results.interval("ste", "bits_per_byte").sd + 0.03
    assert primary.p_corrected == primary.difference.p < 1e-3 and primary.equivalent is False
    assert other.p_corrected == other.difference.p  # the only exploratory one


def test_runs_that_kept_their_pieces_get_an_interval_over_those_too(write_toy):
    study = load_and_run(write_toy("ste", "rotation", "scale", seeds=[0, 1, 2], **PRIMARY))
    assert "pieces" not in write_report(study)[1].read_text()
    weight, draw = np.full(40, 10.0), np.random.default_rng(0)
    for run in study.final_runs({}):
        if run.arm != "scale" or run.seed:  # one that is of an older version
            value = json.loads((run.folder / "summary.json").read_text())["test"]["bits_per_byte"]
            noise = draw.normal(0, 0.2, 40)
            pieces = {"bits_per_byte": Piecewise((value + noise - noise.mean()) * weight, weight)}
            write_pieces(run.folder, {"test": pieces})
    first, second = collect(study).comparisons
    assert second.look is None and first.look.mean == pytest.approx(first.difference.mean)
    assert first.look.high - first.look.low > first.difference.high - first.difference.low
    html_page, markdown = (path.read_text() for path in write_report(study)[:2])
    assert "over seeds and pieces" in markdown and "over seeds<br>and pieces" in html_page
    assert (
        "the chance of the 40 pieces of the test split" in markdown and "the 40 pieces of the test split" in html_page
    )
    rows = [line.count("|") for line in markdown.splitlines() if line.startswith("|") and "rotation" in line]
    heading = next(line for line in markdown.splitlines() if "over seeds and pieces" in line and line.startswith("|"))
    assert rows[0] == heading.count("|")


def test_holm_covers_all_metrics_and_arms_but_the_primary(write_toy):
    metrics = {"bits_per_byte": "min", "perplexity": "min"}
    study = load_and_run(write_toy("ste", "rotation", "scale", seeds=[0, 1, 2, 3], metrics=metrics, **PRIMARY))
    exploratory = [c for c in collect(study).comparisons if not c.primary]
    assert len(exploratory) == 3
    smallest = min(exploratory, key=lambda c: c.difference.p)
    assert smallest.p_corrected == pytest.approx(3 * smallest.difference.p)


def test_a_diverged_seed_makes_no_pair_and_is_counted(write_toy):
    study = load_and_run(write_toy("ste", "rotation", seeds=[0, 1, 2, 3], **PRIMARY))
    lost = next(r for r in collect(study).final if r.arm == "rotation" and r.seed == 2)
    (lost.folder / "summary.json").unlink()
    write_status(lost.folder, state="diverged", error="nan")
    results = collect(study)
    assert (results.primary.difference.n, results.primary.missing) == (3, 1)
    assert [row["state"] for row in failures(results)] == ["diverged"]
    assert any("1 of 4 seeds make no pair" in sentence for sentence in verdict(results))


@pytest.mark.parametrize(
    ("estimator", "delta", "sentences"),
    [
        ("rotation", 0.2, ["rotation is better than ste.", "lies inside ±0.2: the two are equivalent"]),
        ("random_rotation", 0.01, ["random_rotation is worse than ste.", "does not lie inside ±0.01"]),
        ("reflection", 0.001, ["No difference was resolved.", "equivalence is not shown"]),
    ],
)
def test_verdict(write_toy, estimator, delta, sentences):
    primary = {"levels": {"model.quantizer.estimator": estimator}}
    study = load_and_run(write_toy("ste", estimator, seeds=list(range(6)), primary=primary, equivalence=delta))
    text = " ".join(verdict(collect(study)))
    assert all(sentence in text for sentence in sentences), text


def test_verdict_before_there_is_anything(write_toy):
    assert verdict(collect(load_study(write_toy(**PRIMARY)))) == [
        "rotation against ste: 0 of 2 seeds make a pair so far; two are needed."
    ]
    assert "exploratory" in verdict(collect(load_study(write_toy())))[0]


def test_curve_is_the_mean_over_seeds_at_common_points(write_toy):
    study = load_and_run(write_toy(seeds=[0, 1, 2]))
    runs = [run for run in collect(study).final if run.arm == "ste"]
    found = curve(runs, "valid", "bits_per_byte")
    assert found.unit == "tokens" and len(found.x) == 11
    last = [toy_runs.run(run.settings)["test"]["bits_per_byte"] for run in runs]
    assert found.mean[-1] == pytest.approx(np.mean(last), abs=0.05)
    assert (found.low <= found.mean).all() and (found.mean <= found.high).all()
    assert curve(runs, "valid", "nothing") is None


def test_health_is_by_layer(write_toy):
    found = health(collect(load_and_run(write_toy(seeds=[0, 1]))), "ste")
    assert set(found) == {"usage", "perplexity", "dead_codes", "norm_ratio", "cosine", "relative_error"}
    assert set(found["usage"]) == {0, 1}


@pytest.fixture
def reported(write_toy, tmp_path):
    def report(**settings):
        study = load_and_run(write_toy(*settings.pop("estimators", ()), run_dir=str(tmp_path / "out"), **settings))
        write_report(study)
        return study.folder

    return report


def test_report_with_tuning_and_failures(reported):
    folder = reported(
        estimators=["ste", "rotation", "diverges"],
        seeds=[0, 1, 2],
        metrics={"bits_per_byte": "min", "layer0/usage": "max"},
        tune={"train.lr": [0.005, 0.01, 0.02]},
        tune_seeds=[9],
        **PRIMARY,
    )
    html, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    for text in (html, markdown):
        assert "Which?" in text and "rotation is better than ste." in text
        assert "loss is nan at step 7" in text and "diverged" in text
        assert "transformer-vq train" in text and "lr=0.01" in text and "uncorrected" in text
    assert html.count("<svg") == 4
    assert not re.search(r'(src|href)="(?!#|data:|runs\.)', html), "the page fetches something"
    assert {path.stem for path in (folder / "plots").iterdir()} == {
        "differences-bits_per_byte", "differences-layer0-usage", "curves", "health"
    }  # fmt: skip
    tables = re.findall(r"(?m)^\|.*\|\n\|[-:|]+\|\n(?:\|.*\|\n)+", markdown)
    assert all(len({line.count("|") for line in t.splitlines()}) == 1 for t in tables) and len(tables) >= 4


def test_report_by_layer(reported):
    folder = reported(estimators=["ste", "rotation"], design="leave_one_layer_out", seeds=[0, 1])
    assert (folder / "plots" / "layers.png").is_file()
    assert "rotation but in layer 1" in (folder / "report.md").read_text()


def test_report_over_a_grid(reported):
    folder = reported(
        factors={"model.window": [8, 16], "model.quantizer.codes": [16, 32], "model.cache": [True, False]},
        baseline={"model.cache": True},
        figures=[{"x": "codes", "y": "test/bits_per_byte", "series": "cache", "log_x": True}],
    )
    assert {"grid.png", "figure-0.png"} <= {path.name for path in (folder / "plots").iterdir()}
    assert "cache=false − cache=true" in (folder / "report.md").read_text()


def test_report_of_a_study_that_has_not_begun(write_toy):
    study = load_study(write_toy(**PRIMARY))
    for path in write_report(study):
        assert path.is_file()
    assert "4 of 4 runs have no result yet" in (study.folder / "report.html").read_text()


def test_report_into_another_studys_folder_is_refused(write_toy):
    from transformer_vq.studies.run import run_study

    run_study(load_study(write_toy(seeds=[0])), say=lambda text: None)
    with pytest.raises(ConfigError, match="holds another study"):
        write_report(load_study(write_toy(factors={"train.lr": [0.1, 0.2]})))


def test_table_has_every_number_of_every_run(write_toy):
    study = load_and_run(write_toy("ste", "rotation", tune={"train.lr": [0.01, 0.02]}, tune_seeds=[9], seeds=[0, 1]))
    runs = table(collect(study))
    assert len(runs) == 4 + 4 and list(runs["stage"]) == ["tune"] * 4 + ["final"] * 4
    assert set(runs.columns) >= {
        "arm",
        "level/estimator",
        "seed",
        "tuned/lr",
        "test/bits_per_byte",
        "valid/layer1/usage",
    }
    write_report(study)
    again = pd.read_parquet(study.folder / "runs.parquet")
    assert list(again["test/bits_per_byte"]) == list(runs["test/bits_per_byte"])
    assert len(pd.read_csv(study.folder / "runs.csv")) == 8


def test_time_of_a_run_and_of_its_training_are_two_columns(write_toy):
    study = load_and_run(write_toy("ste", seeds=[0, 1]))
    for run in study.final_runs({"ste": {}}):
        path = run.folder / "summary.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": 0.25}))
    runs = table(collect(study))
    assert list(runs["seconds"]) == [1.0, 1.0] and list(runs["training_seconds"]) == [0.25, 0.25]


NAMES = [
    "α |x| β",
    "a\nb",
    "`tick` ``two``",
    "<script>alert(1)</script>",
    "$x_1$ and $y$",
    "[red]not red[/red]",
    "[a](javascript:b)",
    "a/b\\c",
    "_hidden_",
    "*star* ~~gone~~ &amp;",
    "# 1. heading",
    "漢字 😀 " + "very long " * 12,
    "\x1b[31m\a",
    "../../up",
]


def text_of(cell):
    """What a reader sees of a Markdown cell: escapes resolved."""
    return html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", cell))


def test_names_of_any_kind_are_text_everywhere(write_toy, tmp_path, capsys):
    variants = {name: {"train.lr": 0.001 * (i + 1)} for i, name in enumerate(NAMES)}
    study = load_and_run(
        write_toy(
            factors={},
            variants=variants,
            seeds=[0, 1],
            question="Which <b>|</b> $is$ `it`?",
            notes="_notes_ <i>|</i>",
            metrics={"bits_per_byte": "min", "layer0/usage": "max", "../x |y|": "min"},
            figures=[{"x": "train.lr", "y": "test/bits_per_byte", "series": {name: [name] for name in NAMES}}],
            run_dir=str(tmp_path / "out"),
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(study)
    page, markdown = ((study.folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    assert "<script>" not in page and "<b>" not in page.split("</h1>")[0].split("<h1>")[1]
    assert "<script>" not in markdown and not re.search(r"(?<!\\)\]\(javascript", markdown)
    tables = re.findall(r"(?m)^\|.*\|\n\|[-:|]+\|\n(?:\|.*\|\n)+", markdown)
    for table_ in tables:
        cells = [re.split(r"(?<!\\)\|", line) for line in table_.splitlines()]
        assert len({len(row) for row in cells}) == 1, table_
    means = next(t for t in tables if t.startswith("| arm | test"))
    seen = [text_of(re.split(r"(?<!\\)\|", line)[1].strip()) for line in means.splitlines()[2:]]
    plain = [" ".join(clean(name).split()) for name in NAMES]
    assert [" ".join(name.removesuffix(" (reference)").split()) for name in seen] == plain
    assert all(name in " ".join(html.unescape(page).split()) for name in plain)
    for frame in (pd.read_parquet(study.folder / "runs.parquet"), pd.read_csv(study.folder / "runs.csv")):
        assert list(frame["arm"].drop_duplicates()) == [clean(name) for name in NAMES]
    assert all(path.is_relative_to(study.folder) for path in study.folder.rglob("*"))
    assert {path.name for path in study.folder.parent.iterdir()} <= {"out", "base.yaml", "study.yaml"}
    plots = sorted(path.name for path in (study.folder / "plots").iterdir())
    assert all(re.fullmatch(r"[\w.-]+\.png", name, re.ASCII) for name in plots)


def test_names_are_text_in_pictures():
    assert shown("$x_1$ costs $5") == r"\$x_1\$ costs \$5"
    assert shown("_private") == " _private" and shown("a\n b\x07") == "a b\ufffd"
    assert len(shown("long " * 100)) <= 60 and shown("long " * 100).endswith("…")
    figure = Figure()
    axes = figure.subplots()
    axes.set_title(shown("$\\frac{$"))
    for name in ("_a", "$b$"):
        axes.plot([0, 1], [0, 1], label=shown(name))
    legend = axes.legend()
    figure.canvas.draw()
    assert len(legend.get_texts()) == 2


@given(st.text(alphabet=st.sampled_from("ab_*`|$~[](:)<>&#\\\n 1."), max_size=12))
def test_escaped_text_is_one_cell_and_reads_as_it_was(text):
    cell = escape(text)
    assert "\n" not in cell and not re.search(r"(?<!\\)(?:\\\\)*\|", cell)
    assert text_of(cell) == html.unescape(re.sub(r"\s*\n\s*", " ", text)) or "&" in text
    assert escape(Verbatim(text)) == text and escape(3) == 3


def test_pictures_of_two_metrics_have_two_names():
    names = [picture_name(metric) for metric in ("a/b", "a-b", "a b", "../a", "bits_per_byte", "α", "β", "x" * 300)]
    assert len(set(names)) == len(names) or (names[0] == names[1] and len(set(names)) == len(names) - 1)
    assert names[4] == "differences-bits_per_byte" and all(re.fullmatch(r"[\w.-]{1,80}", n, re.ASCII) for n in names)


def test_a_study_without_a_question_has_a_plain_title(write_toy):
    study = load_study(write_toy(question=None))
    write_report(study)
    assert "# Study study\n" in (study.folder / "report.md").read_text()
    assert "<h1>Study study</h1>" in (study.folder / "report.html").read_text()


def test_pairs_without_spread_say_so(write_toy):
    study = load_and_run(write_toy("ste", "rotation", seeds=[0, 1, 2], **PRIMARY))
    for run in collect(study).final:
        value = 2.1 + 0.37 * run.seed + (0.01 if run.arm == "rotation" else 0)
        (run.folder / "summary.json").write_text(json.dumps({"test": {"bits_per_byte": value}}))
    results = collect(study)
    assert math.isnan(results.primary.difference.p)
    text = " ".join(verdict(results))
    assert "by the same amount with every seed" in text and "no noise to test against" in text and "nan" not in text
    write_report(study)
    assert "nan" not in (study.folder / "report.md").read_text().lower().replace("nano", "")


@pytest.mark.parametrize(
    ("value", "tried", "edge"),
    [
        (1, [1, 2, 3], True),
        (1, [1, 3, 0.5], False),  # in whatever order they stand
        (0.5, [1, 3, 0.5], True),
        (1, [1, 2], False),  # of two, each is at an edge
        ("kmeans", ["kmeans", "data", "normal"], False),  # words have none
        (True, [True, False, True], False),
    ],
)
def test_the_edge_of_a_grid(value, tried, edge):
    assert _at_the_edge(value, tried) is edge
