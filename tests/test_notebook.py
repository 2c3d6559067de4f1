"""The notebook runs, and what is stored in it came from it."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


def kinds(cell):
    """What a code cell put out: streams and pictures, not their content; other packages' warnings do not count."""
    shown = [output for output in cell.outputs if output.get("name") != "stderr"]
    return [(output.output_type, sorted(output.get("data", {}))) for output in shown]


def test_the_notebook_runs_and_shows_what_is_stored_in_it(tmp_path, monkeypatch):
    stored = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run = NotebookClient(nbformat.from_dict(stored), timeout=250, resources={"metadata": {"path": tmp_path}}).execute()
    for before, after in zip(stored.cells, run.cells, strict=True):
        if before.cell_type == "code":
            assert kinds(before) == kinds(after), before.source
    said = "".join(output.text for cell in stored.cells for output in cell.get("outputs", []) if "text" in output)
    assert "bits per byte" in said and "def " in said
