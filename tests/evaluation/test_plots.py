"""Pictures from a metrics file: what is drawn, from which records."""

from __future__ import annotations

import json

import numpy as np
import pytest

from transformer_vq.evaluation.plots import PICTURES, draw, read_metrics, write_plots


def records(layers: int = 2, steps: int = 5, splits: tuple[str, ...] = ("train", "valid")) -> list[dict[str, object]]:
    rows = []
    for step in range(1, steps + 1):
        for split in splits:
            row: dict[str, object] = {"step": step, "tokens": 100 * step, "split": split, "loss": 5.0 / step}
            row["bits_per_byte"] = 7.0 / step
            for layer in range(layers):
                for name in ("usage", "perplexity", "norm_ratio", "relative_error"):
                    row[f"layer{layer}/{name}"] = step + layer + (0.5 if split == "valid" else 0)
            rows.append(row)
    return rows


def write(folder, rows) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("layers", [2, 48])
def test_every_picture_is_drawn(tmp_path, layers):
    write(tmp_path, records(layers))
    paths = write_plots(tmp_path)
    assert [path.name for path in paths] == ["loss.png", "codebooks.png", "keys.png"]
    assert all(path.parent == tmp_path / "plots" and path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_full_attention_leaves_the_pictures_of_codebooks_out(tmp_path):
    write(tmp_path, records(layers=0))
    assert [path.name for path in write_plots(tmp_path)] == ["loss.png"]


def test_panels_without_numbers_are_left_out():
    figure = draw(records(), PICTURES["keys"], title="run")  # no cosine in these records
    assert [axes.get_ylabel() for axes in figure.axes] == ["norm ratio ‖q‖ / ‖k‖", "relative error ‖k − q‖ / ‖k‖"]


def test_lines_hold_the_numbers_of_the_file():
    figure = draw(records(layers=2, steps=4), PICTURES["codebooks"], title="run")
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert set(lines) == {"layer 0", "layer 1"}
    np.testing.assert_array_equal(lines["layer 1"].get_xdata(), [100, 200, 300, 400])
    np.testing.assert_array_equal(
        lines["layer 1"].get_ydata(), [2.5, 3.5, 4.5, 5.5]
    )  # the valid split's, not the batches'


def test_one_evaluation_is_no_curve_so_batches_are_drawn():
    rows = records(splits=("train",)) + records(steps=1, splits=("valid",))
    figure = draw(rows, PICTURES["codebooks"], title="run")
    assert figure.axes[0].get_title() == "training batches"


def test_time_is_stacked_and_adds_up():
    rows = [
        {"step": s, "split": "train", "cost/seconds": 2.0, "cost/data": 0.5, "cost/evaluation": 0.5 * (s == 3)}
        for s in (1, 2, 3, 3, 4)  # step 3 was written again after a resume
    ]
    (axes,) = draw([*rows, {"step": 4, "split": "valid", "loss": 1.0}], PICTURES["cost"], title="run").axes
    patches = {patch.get_label(): patch.get_data() for patch in axes.patches}
    assert list(patches) == ["waiting for data  25.0%", "evaluation  6.2%", "training"]
    np.testing.assert_array_equal(patches["evaluation  6.2%"].values, [0.25, 0.25, 0.5, 0.25])
    np.testing.assert_array_equal(patches["training"].baseline, patches["evaluation  6.2%"].values)
    np.testing.assert_array_equal(patches["training"].edges, [0, 1, 2, 3, 4])


def test_bytes_are_shown_in_gib():
    rows = [{"step": s, "tokens": s, "split": "train", "cost/peak_bytes": 2**31} for s in range(40)]  # as on a GPU
    (axes,) = draw(rows, PICTURES["cost"], title="run").axes
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [2] * 40)
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 2


def test_a_step_repeated_after_a_resume_counts_once_with_its_later_value():
    rows = [
        {"step": s, "tokens": s, "split": "train", "loss": v}
        for s, v in [(1, 9.0), (2, 8.0), (3, 7.0), (2, 5.0), (3, 4.0)]
    ]
    line = draw(rows, PICTURES["loss"], title="run").axes[0].lines[0]
    np.testing.assert_array_equal(line.get_ydata(), [9.0, 5.0, 4.0])


def test_a_line_cut_short_by_a_kill_is_left_out_but_a_broken_one_inside_is_not(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1, "lo\n{"step": 2}\n')
    with pytest.raises(json.JSONDecodeError):
        read_metrics(path)
