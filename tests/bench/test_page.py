"""The page of speed keeps what others measured, goes on where it stopped, and leaves empty what nobody measured."""

import json

import pytest

from transformer_vq.bench import attention, device, page
from transformer_vq.cli import run

TIME = {"milliseconds": 10.0, "low": 9.0, "high": 11.0}
ROW = {
    "tokens": 2048, **TIME, "rows": 1, "peak_mib": None, "gflop": 1.0, "mib": 8.0,
    "others": {
        "SDPA": {**TIME, "ratio": 2.5, "ratio_low": 2.4, "ratio_high": 2.6},
        "gla": {"absent": "needs a CUDA device"},
    },
}  # fmt: skip
FACTS = {"device": "A CPU", "kind": "cpu", "threads": 2, "torch": "2.13.0", "commit": "abc"}


@pytest.fixture
def quick(monkeypatch):
    """Ceilings and rows without measuring; what was measured, in order."""
    done = []
    rows = [ROW, {**ROW, "tokens": 8192}]
    monkeypatch.setattr(attention, "run", lambda **options: done.append(options) or rows)
    monkeypatch.setattr(device, "ceilings", lambda dtype: device.Ceilings(1e11, 1e10))
    monkeypatch.setattr(device, "about", lambda: dict(FACTS))
    monkeypatch.setattr(page, "SECTIONS", {"attention": page.SECTIONS["attention"]})
    return done


def test_another_device_adds_its_section(quick, tmp_path, monkeypatch):
    target = tmp_path / "results" / "speed.md"
    assert run(["bench", "all", "--page", str(target)]) == 0
    first = target.read_text()
    assert "## A CPU, 2 threads" in first and "| 2.50 |" in first and "gla: absent, needs a CUDA device" in first
    monkeypatch.setattr(device, "about", lambda: {**FACTS, "device": "A GPU", "kind": "cuda"})
    assert run(["bench", "all", "--page", str(target)]) == 0
    both = target.read_text()
    assert "## A CPU, 2 threads" in both and "## A GPU" in both and len(quick) == 2
    assert quick[1]["heads"] == 8  # what the targets for GPUs are about
    assert len(list(tmp_path.rglob("*.png"))) == 2


def test_it_goes_on_where_it_stopped(quick, tmp_path):
    target = tmp_path / "speed.md"
    for _ in range(2):
        assert run(["bench", "all", "--page", str(target)]) == 0
    assert len(quick) == 1
    assert run(["bench", "all", "--page", str(target), "--again"]) == 0
    assert len(quick) == 2


def test_a_gpu_that_nobody_had_has_empty_cells(quick, tmp_path):
    target = tmp_path / "speed.md"
    assert run(["bench", "all", "--page", str(target), "--only-page"]) == 0
    text = target.read_text()
    assert text.count("Not measured yet") == 2 and page.COMMAND in text and not quick


def test_an_unknown_section_is_the_users(tmp_path, capsys):
    assert run(["bench", "all", "--page", str(tmp_path / "p.md"), "--section", "nothing"]) == 2
    assert "must be one of attention" in capsys.readouterr().err


def test_json_picture_and_file_of_one_benchmark(quick, tmp_path, capsys):
    out, plot = tmp_path / "a.json", tmp_path / "a.png"
    assert run(["bench", "attention", "--json", "--out", str(out), "--plot", str(plot)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text()) and printed["commit"] == "abc"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert run(["bench", "attention", "--out", str(tmp_path / "none" / "a.json")]) == 2


def test_what_was_kept_in_another_form_is_measured_anew(quick, tmp_path):
    target = tmp_path / "speed.md"
    assert run(["bench", "all", "--page", str(target)]) == 0
    (kept,) = tmp_path.rglob("attention.json")
    old = json.loads(kept.read_text())
    kept.write_text(json.dumps(old | {"rows": [{"tokens": 2048, "vq_ms": 1.0}]}))
    assert page.missing(target) == ["attention"]
    assert run(["bench", "all", "--page", str(target), "--only-page"]) == 0
    assert run(["bench", "all", "--page", str(target)]) == 0 and len(quick) == 2
