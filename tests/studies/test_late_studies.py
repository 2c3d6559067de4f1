"""The shipped studies that branch on `recall/repeat`, run from end to end in their tiny form, cut shorter still."""

from __future__ import annotations

import pytest

from transformer_vq.evaluation.pieces import read_pieces
from transformer_vq.studies.folder import write_status
from transformer_vq.studies.kinds import load
from transformer_vq.studies.outcomes import read_summary
from transformer_vq.studies.plan import load_study
from transformer_vq.studies.report import write_report
from transformer_vq.studies.results import collect


@pytest.mark.parametrize(
    "name",
    [
        "where-tiny",
        pytest.param("where-estimators-tiny", marks=pytest.mark.slow),
        pytest.param("upkeep-tiny", marks=pytest.mark.slow),
    ],
)
def test_it_runs_and_reports(tmp_path, name):
    (tmp_path / "text.txt").write_text("".join(f"line {i} of {i * i % 97} things\n" for i in range(2000)))
    changes = {
        "run_dir": tmp_path / "out", "overrides.data.source": tmp_path / "text.txt", "branch.steps": 2,
        "overrides.data.cache": tmp_path / "cache", "overrides.train.steps": 4, "overrides.train.warmup": 1,
        "overrides.recall.examples": 16,
    }  # fmt: skip
    study = load_study(f"studies/{name}", [f"{key}={value}" for key, value in changes.items()])
    for run in [*study.base_runs(), *study.final_runs({})]:
        run.folder.mkdir(parents=True, exist_ok=True)
        load(study.kind.runner)(run.settings, quiet=True)
        write_status(run.folder, state="done", seconds=1.0)
    for run in study.final_runs({}):
        assert run.base is not None and read_summary(run.folder)["averaged_steps"] == 1
        assert len(read_pieces(run.folder, "test")["bits"].total) == 16
    assert "averaged_steps" not in read_summary(study.base_runs()[0].folder)
    results = collect(study)
    assert results.primary is not None and results.primary.missing == 0 and results.primary.look is not None
    report = write_report(study)[1].read_text()
    assert "Late training" in report and "over seeds and pieces" in report
