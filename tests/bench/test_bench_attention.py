"""The attention benchmark compares two sides that are alive, and measures memory that is there."""

import json

from transformer_vq.bench import attention
from transformer_vq.cli import run


def test_rows_hold_both_sides_up_to_the_longest_comparison():
    small = {"heads": 2, "width": 8, "codes": 4, "window": 8, "block_len": 8}
    near, far = attention.run(lengths=(32, 64), repeats=2, compare_up_to=32, **small)
    assert (near["tokens"], far["tokens"]) == (32, 64)
    assert near["vq_ms"] > 0 and near["sdpa_ms"] > 0 and near["ratio"] > 0
    assert far["vq_ms"] > 0 and far["sdpa_ms"] is None and far["ratio"] is None
    assert near["peak_mib"] > 50  # a process with PyTorch in it


def test_table_shows_what_was_not_measured(capsys):
    rows = [{"tokens": 65_536, "vq_ms": 12.0, "sdpa_ms": None, "ratio": None, "peak_mib": None}]
    attention.table(rows, "attention")
    shown = capsys.readouterr().out
    assert "65,536" in shown and "12" in shown and shown.count("–") == 3


def test_rows_measured_before_are_put_together_and_drawn(tmp_path, capsys):
    rows = [
        {"tokens": n, "vq_ms": n / 10, "sdpa_ms": n**2 / 1e3, "ratio": n / 100, "peak_mib": 400.0} for n in (512, 64)
    ]
    far = {"tokens": 4096, "vq_ms": 400.0, "sdpa_ms": None, "ratio": None, "peak_mib": None}
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    files[0].write_text(
        json.dumps({"bench": "attention", "machine": "this", "rows": [{**rows[0], "vq_ms": 1}, rows[1]]})
    )
    files[1].write_text(json.dumps({"bench": "attention", "machine": "this", "rows": [rows[0], far]}))
    picture = tmp_path / "linear.svg"
    arguments = ["bench", "attention", *(word for f in files for word in ("--from", str(f))), "--plot", str(picture)]
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "bench": "attention",
        "machine": "this",
        "rows": [rows[1], rows[0], far],
    }
    assert "</svg>" in picture.read_text()
    (axes,) = attention.draw([rows[1], rows[0], far], "this").axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert list(lines.values()) == [[[64, 4.096e-3], [512, 0.262144]], [[64, 6.4e-3], [512, 0.0512], [4096, 0.4]]]
    for content in ("no", "{}", json.dumps({"bench": "train", "machine": "", "rows": []})):
        files[0].write_text(content)
        assert run(["bench", "attention", "--from", str(files[0])]) == 2
        assert "is not what `bench attention --json` prints" in capsys.readouterr().err
